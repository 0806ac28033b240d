"""Optimal assignment of equal blocks to pipeline stages.

A stage's time is the forward and backward time of all its chunks, including the embedding (first
stage), the head (last stage) and recomputation. It increases with every block, and any number of
blocks per stage is possible. So a greedy algorithm is optimal: assign the blocks one by one, each
to the stage whose time is then the smallest.

Proof. Let T be the time of the stage that gets the last block. Each stage then holds all the blocks
with which its time is below T. A faster assignment could not hold more blocks on any stage, so it
would hold too few blocks in total.

Among equally fast assignments the result is also the most even. Each of them has at least as many
stages at time T. With equally many, they differ only in which of the possible stages are at T; the
tie-break picks those that would otherwise be the slowest, so the remaining stages are the fastest.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keel_megatron.layout.recomputation import Recomputation, nothing
from keel_megatron.layout.times import Load, UnitTimes

Recompute = Callable[[int, Sequence[int]], Recomputation | None]
"""(stage, blocks per chunk) -> recomputed blocks per chunk, or None if the stage does not fit."""


@dataclass(frozen=True)
class StageShare:
    """The blocks of one stage."""

    blocks: tuple[int, ...]
    """Blocks per chunk, in order."""
    again: Recomputation
    """Recomputed blocks per chunk."""
    seconds: float
    """Forward and backward time of one micro-batch."""


def assign_blocks(
    blocks: int,
    pipeline: int,
    virtual_pipeline: int,
    times: UnitTimes,
    recompute: Recompute | None = None,
) -> list[StageShare] | None:
    """Assign blocks to stages to minimise the slowest stage within the memory limits.

    Within a stage, each block goes to the fastest chunk, with the embedding and the head included;
    among equal chunks to the last, which holds the fewest micro-batches. A chunk without embedding
    and head has at least one block.

    Args:
        blocks: number of blocks of the model.
        pipeline: number of stages.
        virtual_pipeline: chunks per stage.
        times: times of the embedding, a block and the head.
        recompute: returns the blocks that a stage must recompute; None: no limit.

    Returns:
        One share per stage, or None if the blocks do not fit in the stages' memory.
    """
    stages = [
        _Stage(number, pipeline, virtual_pipeline, times, recompute or _nothing)
        for number in range(pipeline)
    ]
    if any(stage.share is None for stage in stages):
        return None
    left = blocks - sum(sum(stage.counts) for stage in stages)
    if left < 0:
        raise ValueError(f"{blocks} blocks are too few for {pipeline} x {virtual_pipeline} chunks")
    following = [entry for stage in stages if (entry := stage.entry())]
    heapq.heapify(following)
    for _ in range(left):
        if not following:
            return None
        stage = stages[-following[0][2]]
        stage.advance()
        if entry := stage.entry():
            heapq.heapreplace(following, entry)
        else:
            heapq.heappop(following)
    return [stage.share for stage in stages if stage.share]


def _nothing(_stage: int, blocks: Sequence[int]) -> Recomputation:
    return nothing(blocks)


class _Stage:
    """A stage during the assignment: its share, and its share with one more block."""

    def __init__(
        self,
        number: int,
        pipeline: int,
        virtual_pipeline: int,
        times: UnitTimes,
        recompute: Recompute,
    ) -> None:
        self.number = number
        self.times = times
        self.recompute = recompute
        self.ends = number == 0, number == pipeline - 1
        """Whether it has the embedding, and the head."""
        self.fixed = [0.0] * virtual_pipeline
        least = [1] * virtual_pipeline
        if self.ends[0]:
            self.fixed[0] += times.embedding.total
            least[0] = 0
        if self.ends[1]:
            self.fixed[-1] += times.head.total
            least[-1] = 0
        self.counts = tuple(least)
        self.share = self._share(self.counts)
        self.next = self._share(self._with_one_more())

    def entry(self) -> tuple[float, float, int] | None:
        """Sort key of the stages that can take one more block; the smallest gets it.

        Ties go to the stage that is slowest without the block, then to the last, which holds the
        fewest micro-batches.
        """
        if self.share is None or self.next is None:
            return None
        return self.next.seconds, -self.share.seconds, -self.number

    def advance(self) -> None:
        """Add one block."""
        assert self.next is not None
        self.share, self.counts = self.next, self.next.blocks
        self.next = self._share(self._with_one_more())

    def _with_one_more(self) -> tuple[int, ...]:
        unit = self.times.block.total
        chunks = range(len(self.counts))
        chosen = min(chunks, key=lambda c: (self.fixed[c] + self.counts[c] * unit, -c))
        return tuple(count + (chunk == chosen) for chunk, count in enumerate(self.counts))

    def _share(self, counts: tuple[int, ...]) -> StageShare | None:
        again = self.recompute(self.number, counts)
        if again is None:
            return None
        load = Load(sum(counts), *self.ends, sum(again.full), sum(again.light), chunks=len(counts))
        return StageShare(counts, again, self.times.of(load).longer.total)
