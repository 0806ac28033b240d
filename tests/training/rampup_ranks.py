"""Whole loops on made-up samples, each of which has a number of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from keel_megatron.data.batches import Batch, BatchSource
from keel_megatron.data.sequences import Sequence
from tests.checkpoint.ranks import MadeUp, Ran, Sections, run_in_turn


class MadeUpSamples:
    """Sample k is random tokens that depend on k alone."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self._length, self._vocabulary = length, vocabulary

    def read(self, number: int, *, tokens: bool) -> Sequence:
        generator = np.random.default_rng(number)
        row = generator.integers(0, self._vocabulary, self._length + 1)
        return Sequence(row if tokens else None, (self._length + 1,))


def by_sample(patch: pytest.MonkeyPatch) -> None:
    """The real source of batches, on made-up samples."""

    def micro_batches(self: MadeUp, consumed: int, size: int) -> Iterator[Batch]:
        data, runtime = self.config.data, self.runtime
        samples: Any = MadeUpSamples(data.seq_length, data.vocab_size)
        return BatchSource(
            samples,
            self.config.training.micro_batch_size,
            runtime.data_rank,
            runtime.data_size,
        ).micro_batches(consumed, size)

    patch.setattr(MadeUp, "micro_batches", micro_batches)


def trained(size: int, runs: dict[str, Sections]) -> dict[str, list[Ran]]:
    """How each run went on every rank."""
    faults = {sections["training"]["name"]: by_sample for sections in runs.values()}
    found = run_in_turn(size, list(runs.values()), faults)
    return dict(zip(runs, found, strict=True))
