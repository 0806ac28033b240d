"""Log probabilities of tokens that a trained model gives, over tensor, pipeline and data ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from keel_megatron.architecture.residual import streams
from keel_megatron.evaluation.rows import Row, Score
from keel_megatron.inference.sampling import not_finite
from keel_megatron.inference.source import Source
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.tracking.progress import duration

BATCH_TOKENS: Final = 8192
"""Tokens of a batch by default, padding included."""
SECONDS_BETWEEN_LINES: Final = 5.0

Say = Callable[[str], None]


class Scorer:
    """Scores rows of tokens with a model.

    Every rank calls `score` with the same rows. Rows are shared over the replicas of the model; the
    stages of a replica pass the stream on. Only the scored tokens' logits are computed, a slice at
    a time (kernels.logits_mib), and their softmax is fp32.

    Args:
        source: the model.
        runtime: this rank's place.
        batch_tokens: tokens of a batch, padding included; a longer row is a batch of its own.
    """

    def __init__(self, source: Source, runtime: Runtime, batch_tokens: int = BATCH_TOKENS) -> None:
        self.runtime, self.batch_tokens = runtime, batch_tokens
        self.context = source.config.data.seq_length
        """Tokens that the model sees at most; a row has one more."""
        self._hidden_size = source.config.model.hidden_size
        self._streams = streams(source.config.model)
        self._slice = source.config.kernels.rows_at_once(source.config.data.vocab_size)
        self._chunk: Any = source.model.eval()
        self._is_first = runtime.pipeline_rank == 0
        self._is_last = runtime.pipeline_rank == runtime.pipeline_size - 1

    @torch.inference_mode()
    def score(self, rows: Sequence[Row], say: Say | None = None) -> list[Score]:
        """Log probabilities of the rows' scored tokens; collective over all ranks.

        Args:
            rows: what is scored, the same on every rank.
            say: called on rank 0 with the progress, every few seconds.

        Returns:
            A score a row, in the order of the rows, the same on every rank.

        Raises:
            UserError: the model's logits are not finite.
            ValueError: a row is longer than the context and one more, or scores no token or all.
        """
        for row in rows:
            _check(row, self.context)
        if not rows:
            return []
        first = [0]
        for row in rows:
            first.append(first[-1] + row.scored)
        # Log probabilities and whether each is the largest. Every rank adds what it has to zeros:
        # the sum is exact.
        found = torch.zeros((2, first[-1]), device=self.runtime.device)
        # Similar lengths together: less padding. Longest first: what does not fit fails at once.
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].tokens), reverse=True)
        own = order[self.runtime.data_rank :: self.runtime.data_size]
        progress = _Progress(sum(len(rows[n].tokens) for n in own), self._sayer(say))
        for batch in _batches(own, rows, self.batch_tokens):
            self._score_batch([rows[n] for n in batch], [first[n] for n in batch], found)
            progress.add(sum(len(rows[n].tokens) for n in batch))
        dist.all_reduce(found)
        logs, largest = found[0].tolist(), found[1].bool().tolist()
        if not bool(found.isfinite().all()):
            raise not_finite(reported=not self.runtime.is_main)
        spans = [slice(*pair) for pair in pairwise(first)]
        return [Score(tuple(logs[span]), all(largest[span])) for span in spans]

    def _sayer(self, say: Say | None) -> Say | None:
        return say if self.runtime.is_main else None

    def _score_batch(self, rows: list[Row], first: list[int], found: Tensor) -> None:
        """Fill in the scores of a batch.

        Args:
            rows: the batch.
            first: place of each row's first score.
            found: [2, scores]; filled on the first tensor rank of the replica's last stage.
        """
        device = self.runtime.device
        columns = len(rows[0].tokens) - 1  # the last token is only predicted
        padded = [[*row.tokens[:-1], *[0] * (columns + 1 - len(row.tokens))] for row in rows]
        x = self._forward(torch.tensor(padded, device=device))
        if x is None:
            return
        # Padding is on the right, where causal attention does not see it.
        ends = [len(row.tokens) - 1 for row in rows]
        places = [
            (column, number, row.tokens[column + 1], start + column - (end - row.scored))
            for number, (row, start, end) in enumerate(zip(rows, first, ends, strict=True))
            for column in range(end - row.scored, end)
        ]
        for start in range(0, len(places), self._slice):
            part = torch.tensor(places[start : start + self._slice], device=device)
            column, number, label, place = part.unbind(1)
            logs = torch.log_softmax(self._logits(x[column, number]), -1)
            if self.runtime.tensor_rank == 0:
                found[0, place] = logs.gather(1, label[:, None])[:, 0]
                found[1, place] = (logs.argmax(-1) == label).float()

    def _forward(self, tokens: Tensor) -> Tensor | None:
        """The head's input [s, b, h] of tokens [b, s], on the last stage; elsewhere None."""
        b, s = tokens.shape
        chunk = self._chunk
        if self._is_first:
            x = chunk.embedding(input_ids=tokens, position_ids=None)
        else:
            x = torch.empty((s, self._streams * b, self._hidden_size), device=tokens.device)
            dist.recv(x, self.runtime.on_stage(self.runtime.pipeline_rank - 1))
            chunk.decoder.set_input_tensor(x)
        x = chunk.decoder(
            hidden_states=x, attention_mask=None, rotary_pos_emb=chunk.rotary_pos_emb(s)
        )
        if self._is_last:
            return x
        dist.send(x.contiguous(), self.runtime.on_stage(self.runtime.pipeline_rank + 1))
        return None

    def _logits(self, x: Tensor) -> Tensor:
        """Logits [n, vocabulary], fp32, of n columns [n, h] of the head's input."""
        chunk = self._chunk
        tied = chunk.share_embeddings_and_output_weights
        weight = chunk.shared_embedding_or_output_weight() if tied else None
        logits: Tensor = chunk.output_layer(x[:, None], weight, runtime_gather_output=True)[0]
        return logits[:, 0].float()


class _Progress:
    """Says every few seconds what part of the tokens is done."""

    def __init__(self, total: int, say: Say | None) -> None:
        self._total, self._done, self._say = total, 0, say
        self._started = self._said = time.monotonic()

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self._done += tokens
        now = time.monotonic()
        if self._say is None or now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        share, seconds = self._done / self._total, now - self._started
        self._say(
            f"{share:4.0%}  {self._done / seconds:,.0f} tokens/s per replica, "
            f"{duration(seconds * (1 - share) / share)} left"
        )


def _check(row: Row, context: int) -> None:
    if not 1 <= row.scored < len(row.tokens) <= context + 1:
        raise ValueError(
            f"a row of {len(row.tokens)} tokens, {row.scored} of them scored, with a context of "
            f"{context}"
        )


def _batches(order: list[int], rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Rows that are scored together; `order` has the longest first."""
    begin = 0
    while begin < len(order):
        size = max(1, batch_tokens // (len(rows[order[begin]].tokens) - 1))
        yield order[begin : begin + size]
        begin += size
