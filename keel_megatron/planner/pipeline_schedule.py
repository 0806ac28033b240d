"""Pipeline schedules of Megatron-core 0.16.1: 1F1B and interleaved 1F1B.

Source: `megatron/core/pipeline_parallel/schedules.py` (`get_schedule_table`,
`get_pp_rank_microbatches`), and Narayanan et al., arXiv 2104.04473, figure 4.
"""

from __future__ import annotations

from typing import NamedTuple


class Operation(NamedTuple):
    """The forward or backward pass of one micro-batch through one chunk of a stage."""

    forward: bool
    chunk: int
    """Number of the chunk within its stage, from 0."""
    micro_batch: int


def warmup_forwards(
    pipeline: int, virtual_pipeline: int, micro_batches: int, pipeline_rank: int
) -> int:
    """Forward passes of a stage before its first backward pass."""
    behind = pipeline - pipeline_rank - 1
    if virtual_pipeline == 1:
        return min(behind, micro_batches)
    return min(2 * behind + (virtual_pipeline - 1) * pipeline, micro_batches * virtual_pipeline)


def stage_order(
    pipeline: int, virtual_pipeline: int, micro_batches: int, pipeline_rank: int
) -> list[Operation]:
    """All passes of one step on one stage, in order.

    After the warm-up, forward and backward passes alternate; the remaining passes are backward.

    Args:
        pipeline: number of stages.
        virtual_pipeline: chunks per stage; 1: 1F1B.
        micro_batches: micro-batches per replica and step; with interleaving, a multiple of
            `pipeline`.
        pipeline_rank: the stage, from 0.

    Raises:
        ValueError: interleaving with micro-batches that `pipeline` does not divide.
    """
    forwards = _forward_order(pipeline, virtual_pipeline, micro_batches)
    # Backward passes use the same table with the chunks in reverse order.
    backwards = [
        Operation(False, virtual_pipeline - 1 - chunk, micro_batch)
        for _forward, chunk, micro_batch in forwards
    ]
    warmup = warmup_forwards(pipeline, virtual_pipeline, micro_batches, pipeline_rank)
    steady = len(forwards) - warmup
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards[:steady], strict=True):
        order += (forward, backward)
    return order + backwards[steady:]


def _forward_order(pipeline: int, virtual_pipeline: int, micro_batches: int) -> list[Operation]:
    """Groups of `pipeline` micro-batches pass chunk after chunk (Megatron-core's default group)."""
    if virtual_pipeline == 1:
        return [Operation(True, 0, micro_batch) for micro_batch in range(micro_batches)]
    if micro_batches % pipeline:
        raise ValueError(
            f"{micro_batches} micro-batches are not a multiple of {pipeline} interleaved stages"
        )
    return [
        Operation(True, chunk, micro_batch)
        for first in range(0, micro_batches, pipeline)
        for chunk in range(virtual_pipeline)
        for micro_batch in range(first, first + pipeline)
    ]
