"""Sequences of each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of one global batch size."""

    steps: int
    size: int
    """Sequences per step."""


@dataclass(frozen=True)
class BatchSizes:
    """Global batch size as a function of the samples consumed before the step, and of nothing else.

    Without a ramp-up, `full` at every step. With one, as Megatron-LM defines it: `increments` equal
    increments from `start` to `full`, each after 1 / `increments` of `samples`.
    """

    full: int
    """`training.global_batch_size`."""
    start: int = 0
    """Sequences of the first step; not used without a ramp-up."""
    increments: int = 0
    """Number of increments; 0: no ramp-up."""
    samples: int = 0
    """Samples consumed when the batch has its full size."""

    @property
    def increment(self) -> int:
        """Sequences that an increment adds."""
        return (self.full - self.start) // self.increments

    @property
    def unit(self) -> int:
        """Greatest common divisor of the sizes: whatever divides it divides every batch."""
        return math.gcd(self.start, self.increment) if self.increments else self.full

    def at(self, consumed: int) -> int:
        """Sequences of the step before which so many samples are consumed."""
        if not self.increments or consumed >= self.samples:
            return self.full
        return self.start + consumed * self.increments // self.samples * self.increment

    def phases(self, steps: int, consumed: int = 0) -> Iterator[Phase]:
        """The next steps, those of the same size together.

        Args:
            steps: number of steps.
            consumed: samples consumed before them.
        """
        while steps > 0:
            size, count = self.at(consumed), steps
            if size < self.full:
                reached = (size - self.start) // self.increment + 1
                # The fewest samples at which `at` has the next size, rounded up.
                border = -(-reached * self.samples // self.increments)
                count = min(steps, -(-(border - consumed) // size))
            yield Phase(count, size)
            steps -= count
            consumed += count * size

    def samples_of(self, steps: int, consumed: int = 0) -> int:
        """Samples of the next steps.

        Args:
            steps: number of steps.
            consumed: samples consumed before them.
        """
        return sum(phase.steps * phase.size for phase in self.phases(steps, consumed))
