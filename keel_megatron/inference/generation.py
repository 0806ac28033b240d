"""Continue prompts, a batch at a time: read them, then choose one token after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from keel_megatron.inference.continuation import Continuation, Decodes
from keel_megatron.inference.decoder import Decoder
from keel_megatron.inference.sampling import Sampling, choose, not_finite

Reason = Literal[
    "end of document", "end of answer", "stop text", "maximum of new tokens", "end of context"
]
"""Why a continuation ended."""
_DIVERGED = -1


@dataclass
class Sequence:
    """A prompt and its continuation.

    Args:
        number: of the prompt, from 0; its random numbers depend on it.
        prompt: its tokens, at least one.
    """

    number: int
    prompt: list[int]
    seen: list[int] = field(default_factory=list)
    """The tokens in the model's context, and the newest one."""
    new: list[int] = field(default_factory=list)
    text: str = ""
    """Of the new tokens, up to a stop text."""
    ended: Reason | None = None


@dataclass
class Speed:
    """Tokens and seconds of prefill and decode."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    """Without each prompt's first new token, which its prefill gives."""
    decode_seconds: float = 0.0

    def line(self) -> str:
        """The figures."""
        rate = self.decoded_tokens / max(self.decode_seconds, 1e-9)
        return (
            f"{self.prompt_tokens} tokens of prompts read in {self.prefill_seconds:.2f} s, "
            f"{self.decoded_tokens} decoded in {self.decode_seconds:.2f} s: {rate:.1f} tokens/s"
        )


class Generation:
    """Continues prompts with a model.

    Args:
        decoder: the model.
        tokenizer: the model's; its `eod` ends a document.
        context: the model's context in tokens, data.seq_length.
        sampling: the settings.
        ends: tokens that end a continuation; None: the end of a document.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        context: int,
        sampling: Sampling,
        ends: Mapping[int, Reason] | None = None,
    ) -> None:
        self.decoder, self.tokenizer, self.context = decoder, tokenizer, context
        self.sampling = sampling
        self.ends: Mapping[int, Reason] = ends or {tokenizer.eod: "end of document"}
        self.speed = Speed()

    def run(
        self, prompts: dict[int, list[int]], say: Callable[[str], None] | None = None
    ) -> list[Sequence]:
        """Continue the prompts of a batch; collective over all ranks.

        Args:
            prompts: tokens by number; none may fill the context, unless it slides.
            say: called with the first prompt's continuation, piece by piece.

        Raises:
            UserError: the model's logits are not finite.
        """
        rows = [_Row(Sequence(*item), self.tokenizer, self.sampling) for item in prompts.items()]
        for row in rows:
            if len(row.sequence.prompt) >= self.context:
                row.slide(self.context)
        rows[0].say = say
        left = rows
        while left:
            # Without sliding once: a row that is full then has ended.
            self._until_full(left)
            left = [row for row in left if row.sequence.ended is None]
            for row in left:
                if len(row.sequence.seen) >= self.context:
                    row.slide(self.context)
        return [row.sequence for row in rows]

    def _until_full(self, rows: list[_Row]) -> None:
        """Read the rows' sequences and continue them until all have ended, or one is full."""
        seen = [row.sequence.seen for row in rows]
        new = min(
            self.sampling.max_new_tokens - min(len(row.sequence.new) for row in rows),
            self.context - min(map(len, seen)),
        )
        begin = time.perf_counter()
        tokens = self._chosen(self.decoder.prefill(seen, new), rows)
        self.speed.prompt_tokens += sum(map(len, seen))
        self.speed.prefill_seconds += time.perf_counter() - begin
        begin = time.perf_counter()
        while True:
            for row, token in zip(rows, tokens, strict=True):
                row.add(token, self.ends, self.context)
            running = [row for row in rows if row.sequence.ended is None]
            if not running or any(len(row.sequence.seen) >= self.context for row in running):
                break
            tokens = self._chosen(self.decoder.step(tokens), rows)
            self.speed.decoded_tokens += len(running)
        self.speed.decode_seconds += time.perf_counter() - begin

    def _chosen(self, logits: Tensor | None, rows: list[_Row]) -> list[int]:
        """The next token of every row, on every rank; of one that has ended it has no meaning."""
        tokens = [0] * len(rows)
        if logits is not None:
            tokens = self._choose(logits, rows)
        tokens = self.decoder.agree(tokens)
        if _DIVERGED in tokens:
            raise not_finite(reported=not self.decoder.runtime.is_main)
        return tokens

    def _choose(self, logits: Tensor, rows: list[_Row]) -> list[int]:
        if not logits.isfinite().all():
            return [_DIVERGED] * len(rows)
        if self.sampling.temperature == 0:
            return [int(token) for token in logits.argmax(-1)]
        return [
            choose(line, self.sampling, row.generator) if row.sequence.ended is None else 0
            for line, row in zip(logits.cpu(), rows, strict=True)
        ]


class _Row:
    """A sequence that is being continued."""

    def __init__(self, sequence: Sequence, tokenizer: Decodes, sampling: Sampling) -> None:
        self.sequence, self.sampling = sequence, sampling
        sequence.seen = list(sequence.prompt)
        self.generator: torch.Generator = sampling.generator(sequence.number)
        self.continuation = Continuation(tokenizer, sequence.prompt, sampling.stop)
        self.say: Callable[[str], None] | None = None

    def slide(self, context: int) -> None:
        """Keep the newest half of the context."""
        self.sequence.seen = self.sequence.seen[-max(1, context // 2) :]

    def add(self, token: int, ends: Mapping[int, Reason], context: int) -> None:
        """Append a token, and end the continuation where it ends."""
        sequence = self.sequence
        if sequence.ended is not None:
            return
        if token in ends:
            self._end(ends[token])
            return
        sequence.seen.append(token)
        sequence.new.append(token)
        self._say(self.continuation.add(token))
        if self.continuation.stopped:
            self._end("stop text")
        elif len(sequence.new) >= self.sampling.max_new_tokens:
            self._end("maximum of new tokens")
        elif len(sequence.seen) >= context and not self.sampling.slide:
            self._end("end of context")

    def _end(self, reason: Reason) -> None:
        self._say(self.continuation.finish())
        if self.continuation.stopped:
            reason = "stop text"
        self.sequence.ended, self.sequence.text = reason, self.continuation.text

    def _say(self, text: str) -> None:
        if self.say is not None and text:
            self.say(text)
