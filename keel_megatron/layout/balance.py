"""The exact cut of a stack of equal blocks into stages.

A stage's time is that of all of its chunks, forward and backward, with the embedding (first stage)
or the head (last stage) and what it recomputes. It grows with every block, and any count of blocks
on each stage can be laid out in order. So hand out the blocks one by one, always to the stage that
is then the least slow. Let T be that stage's time for the last block. Every stage has then all the
blocks with which it stays below T, and a cut that is faster than T has no more of them: too few.

It is the most even of the cuts as fast, too: each of those gives as many stages the time T, or
more; and if as many, the rest is the same but for which of the stages that can be at T are. Taking
those that would be the slowest otherwise leaves the fastest rest.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keel_megatron.layout.times import UnitTimes

Recompute = Callable[[int, Sequence[int]], tuple[int, ...] | None]
"""(stage, blocks of its chunks) -> recomputed blocks of its chunks, or None: it does not fit."""


@dataclass(frozen=True)
class StageShare:
    """The blocks of one stage."""

    blocks: tuple[int, ...]
    """Of each of its chunks, in order."""
    recomputed: tuple[int, ...]
    """Of these, how many of each chunk are computed again in the backward pass."""
    seconds: float
    """Forward and backward of one micro-batch."""


def cut(
    blocks: int,
    pipeline: int,
    virtual_pipeline: int,
    times: UnitTimes,
    recompute: Recompute | None = None,
) -> list[StageShare] | None:
    """The blocks of every stage, minimizing the slowest one under each one's memory limit.

    Within a stage blocks go to the chunk that takes the least time, embedding and head counted in;
    among equals to the latest, which holds the fewest micro-batches. A chunk with neither embedding
    nor head has a block at least.

    Args:
        blocks: of the model.
        pipeline: stages.
        virtual_pipeline: chunks of a stage.
        times: of an embedding, a block and the head.
        recompute: what a stage must recompute; None = nothing, all fits.

    Returns:
        One share a stage, or None if the blocks do not fit into the stages' memory.
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


def _nothing(_stage: int, blocks: Sequence[int]) -> tuple[int, ...]:
    return (0,) * len(blocks)


class _Stage:
    """A stage while blocks are handed out: what it has, and what it would be with one more."""

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
        self.fixed = [0.0] * virtual_pipeline
        least = [1] * virtual_pipeline
        if number == 0:
            self.fixed[0] += times.embedding.total
            least[0] = 0
        if number == pipeline - 1:
            self.fixed[-1] += times.head.total
            least[-1] = 0
        self.counts = tuple(least)
        self.share = self._share(self.counts)
        self.next = self._share(self._with_one_more())

    def entry(self) -> tuple[float, float, int] | None:
        """What orders the stages that can take one more block: the least is the next to get it.

        Among equals that is the slowest without it, then the latest, which holds the fewest
        micro-batches.
        """
        if self.share is None or self.next is None:
            return None
        return self.next.seconds, -self.share.seconds, -self.number

    def advance(self) -> None:
        """Take one more block."""
        assert self.next is not None
        self.share, self.counts = self.next, self.next.blocks
        self.next = self._share(self._with_one_more())

    def _with_one_more(self) -> tuple[int, ...]:
        unit = self.times.block.total
        chunks = range(len(self.counts))
        chosen = min(chunks, key=lambda c: (self.fixed[c] + self.counts[c] * unit, -c))
        return tuple(count + (chunk == chosen) for chunk, count in enumerate(self.counts))

    def _share(self, counts: tuple[int, ...]) -> StageShare | None:
        recomputed = self.recompute(self.number, counts)
        if recomputed is None:
            return None
        block = self.times.block
        seconds = sum(self.fixed) + sum(counts) * block.total + sum(recomputed) * block.forward
        return StageShare(counts, recomputed, seconds)
