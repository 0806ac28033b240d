"""A model on several ranks, used by a program that runs on the first of them alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from keel_megatron.errors import UserError
from keel_megatron.evaluation.rows import Row, Score
from keel_megatron.evaluation.scoring import BATCH_TOKENS, Scorer
from keel_megatron.inference.decoder import Decoder
from keel_megatron.inference.generation import Generation
from keel_megatron.inference.sampling import Sampling
from keel_megatron.inference.source import Source
from keel_megatron.runtime.distributed import Runtime


class Served:
    """A loaded model that scores rows and continues prompts.

    Every rank makes one. Rank 0 calls `score` and `generate` within `leading`; meanwhile the others
    are in `serve`, which makes the same calls. The model's replicas share the work.

    Args:
        source: the model.
        runtime: this rank's place.
        batch_tokens: tokens of a batch, padding included.
        say: called on rank 0 with progress.
    """

    def __init__(
        self,
        source: Source,
        runtime: Runtime,
        batch_tokens: int = BATCH_TOKENS,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.source, self.runtime = source, runtime
        self.context: int = source.config.data.seq_length
        self._batch_tokens, self._say = batch_tokens, say
        self._scorer = Scorer(source, runtime, batch_tokens)
        self._decoder: Decoder | None = None
        self._calls: dict[str, Callable[..., Any]] = {
            "score": self._score,
            "generate": self._generate,
        }
        self._is_calling = False

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """A score a row; on rank 0.

        Raises:
            UserError: the model's logits are not finite.
        """
        found: list[Score] = self._call("score", rows)
        return found

    def generate(self, prompts: list[list[int]], sampling: Sampling) -> list[str]:
        """The continuation of each prompt; on rank 0.

        Args:
            prompts: tokens, at least one and fewer than the context.
            sampling: the settings. Prompt i draws from seed + i.

        Raises:
            UserError: the model's logits are not finite, or the cache does not fit in memory.
        """
        found: list[str] = self._call("generate", prompts, sampling)
        return found

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On rank 0: at the end of the block, however it ends, the other ranks stop serving."""
        try:
            yield
        finally:
            # An error within a call is raised on every rank, or ends the group.
            if not self._is_calling:
                self._send(None)

    def serve(self) -> None:
        """On the other ranks: make rank 0's calls until it ends.

        Raises:
            UserError: a call's, as on rank 0.
        """
        while (call := self._send(None)) is not None:
            name, arguments = call
            self._calls[name](*arguments)

    def _call(self, name: str, *arguments: Any) -> Any:
        self._is_calling = True
        self._send((name, arguments))
        answer = self._calls[name](*arguments)
        self._is_calling = False
        return answer

    def _send(self, call: Any) -> Any:
        """Rank 0's call, on every rank; None ends the others."""
        if self.runtime.launch.world_size == 1:
            return call
        shared = [call]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _score(self, rows: Sequence[Row]) -> list[Score]:
        return self._scorer.score(rows, self._say)

    def _generate(self, prompts: list[list[int]], sampling: Sampling) -> list[str]:
        """Continue the prompts; every replica takes its part, of similar lengths in a batch."""
        config, runtime = self.source.config, self.runtime
        self._decoder = self._decoder or Decoder(self.source.model, config.model, runtime)
        generation = Generation(self._decoder, self.source.tokenizer, self.context, sampling)
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]), reverse=True)
        own = order[runtime.data_rank :: runtime.data_size]
        texts: dict[int, str] = {}
        problem: str | None = None
        try:
            while own:
                columns = min(self.context, len(prompts[own[0]]) + sampling.max_new_tokens)
                size = max(1, self._batch_tokens // columns)
                batch, own = own[:size], own[size:]
                for row in generation.run({number: prompts[number] for number in batch}):
                    texts[row.number] = row.text
        except UserError as error:  # the other replicas do not know of it
            problem = str(error)
        shared: list[Any] = [None] * runtime.launch.world_size
        dist.all_gather_object(shared, (texts, problem))
        problems = [found for _texts, found in shared if found is not None]
        if problems:
            raise UserError(problems[0], reported=not runtime.is_main)
        whole = {number: text for part, _problem in shared for number, text in part.items()}
        return [whole[number] for number in range(len(prompts))]
