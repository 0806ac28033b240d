"""Micro-batches in flight against Megatron-core's own schedule; memory kinds by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.memory import MemoryModel, in_flight
from keel_megatron.layout.recomputation import first
from tests.settings import small_config


def walked(pipeline: int, virtual: int, stage: int, micro_batches: int) -> Iterator[list[int]]:
    """Counts by chunk after every pass of the schedule that Megatron-core would run."""
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    group = SimpleNamespace(size=lambda: pipeline, rank=lambda: stage)
    place = SimpleNamespace(
        pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
    )
    total, _, ahead, _ = get_pp_rank_microbatches(
        micro_batches, virtual, pipeline, p2p_communicator=place
    )
    chunks = [chunk for _, chunk in get_schedule_table(micro_batches, virtual, pipeline)]
    counts = [0] * virtual
    backward = 0
    for forward in range(total):
        counts[chunks[forward]] += 1
        yield list(counts)
        if forward >= ahead:
            counts[virtual - 1 - chunks[backward]] -= 1
            backward += 1


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.data())
def test_micro_batches_in_flight_are_those_of_the_schedule(
    pipeline: int, virtual: int, groups: int, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, pipeline - 1))
    virtual = virtual if pipeline > 1 else 1
    micro_batches = groups * pipeline if virtual > 1 else data.draw(st.integers(1, 12))
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=virtual, max_size=virtual))

    def fullest(moments: Any) -> int:
        return max(sum(n * size for n, size in zip(m, sizes, strict=True)) for m in moments)

    found = in_flight(pipeline, virtual, stage, micro_batches)
    assert fullest(found) == fullest(walked(pipeline, virtual, stage, micro_batches))
    assert all(a >= b for moment in found for a, b in itertools.pairwise(moment))


def test_the_first_stage_holds_the_most() -> None:
    assert [in_flight(4, 1, stage, 16) for stage in range(4)] == [((n,),) for n in (4, 3, 2, 1)]
    # (v - 1) p + 2 (p - 1) + 1 = 11 chunk passes, against 8 = 4 whole stages without interleaving.
    assert max(map(sum, in_flight(4, 2, 0, 16))) == 11
    assert in_flight(4, 1, 0, 2) == ((2,),)


def model(data_parallel: int = 1, **overrides: Any) -> MemoryModel:
    config = small_config(**overrides)
    return MemoryModel(config, model_costs(config, "torch"), data_parallel)


@pytest.mark.parametrize(
    ("precision", "distributed", "replicas", "a_parameter"),
    [
        # Adam in mixed precision: 18 bytes a parameter, 6 + 12/dp with the distributed optimizer.
        ("bf16", False, 4, 18.0),
        ("bf16", True, 4, 6 + 12 / 4),
        ("fp32", False, 4, 16.0),
        ("fp32", True, 4, 8 + 8 / 4),
    ],
)
def test_bytes_of_a_parameter(
    precision: str, distributed: bool, replicas: int, a_parameter: float
) -> None:
    memory = model(
        replicas,
        training__precision=precision,
        parallel__distributed_optimizer=distributed,
        parallel__pipeline=2,
    )
    stage = memory.stage(0, (4,), (0,))
    weights = 4 * memory.costs.block.parameters + memory.costs.embedding.parameters
    norm_weights = 4 * memory.costs.block.vector_parameters
    extra = (
        0 if precision == "fp32" else norm_weights * (-2 + (4 if not distributed else 4 / replicas))
    )
    states = stage.parameters + stage.gradients + stage.optimizer
    # Gains are fp32 in any precision: no half-size copy, no master.
    assert states == pytest.approx((weights + norm_weights) * a_parameter - extra, rel=1e-4)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_stages_have_the_models_parameters(pipeline: int, tie: bool) -> None:
    """One stage's tied embedding is counted once; two stages each have a copy."""
    memory = model(parallel__pipeline=pipeline, model__tie_embeddings=tie)
    blocks = 8 // pipeline
    gradients = sum(memory.stage(r, (blocks,), (0,)).gradients for r in range(pipeline)) // 4
    exact = parameter_count(memory.config.model, 512) + 64  # the first block has a norm less
    assert gradients == exact + (64 * 512 if tie and pipeline == 2 else 0)


def test_activations_follow_what_is_in_flight() -> None:
    memory = model(parallel__pipeline=4, parallel__virtual_pipeline=1)
    kept = memory.costs.block.activation_bytes
    found = [memory.stage(stage, (2,), (0,)).activations for stage in range(3)]
    assert found == [2 * kept * count for count in (4, 3, 2)]
    head = memory.costs.head.activation_bytes
    assert memory.stage(3, (2,), (0,)).activations == 2 * kept + head
    assert memory.stage(3, (2,), (0,)).logits > 0 == memory.stage(2, (2,), (0,)).logits


@settings(deadline=None)
@example(pipeline=3, virtual=2, stage=1, blocks=[1, 2, 0], tightness=0.5)
@given(
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(0, 3),
    st.lists(st.integers(0, 4), min_size=3, max_size=3),
    st.floats(0.0, 1.1),
)
def test_recompute_auto_takes_the_least_that_does(
    pipeline: int, virtual: int, stage: int, blocks: list[int], tightness: float
) -> None:
    """Against every other number of blocks: the fewest full ones, then few light ones.

    Blocks of the first chunks come first; other choices of as many blocks are not tried.
    """
    blocks, stage = blocks[:virtual], min(stage, pipeline - 1)
    memory = model(
        parallel__pipeline=pipeline, parallel__virtual_pipeline=virtual, parallel__recompute="auto"
    )
    none, all_of_them = (memory.stage(stage, blocks, r).total for r in ([0] * virtual, blocks))
    limit = all_of_them + tightness * (none - all_of_them) - 1
    total = sum(blocks)
    each = [
        first(blocks, full, light) for full in range(total + 1) for light in range(total - full + 1)
    ]
    fitting = [c for c in each if memory.stage(stage, blocks, *c).total <= limit]
    found = memory.recomputation(stage, blocks, limit)
    if not fitting:
        assert found is None
    else:
        assert found is not None
        assert found in fitting
        full, light = map(sum, found)
        assert full == min(sum(c[0]) for c in fitting)
        # Of the light ones the fewest of those that come next.
        if light:
            fewer = first(blocks, full, light - 1)
            assert memory.stage(stage, blocks, *fewer).total > limit


def test_the_head_a_block_or_the_embedding_needs_the_most() -> None:
    """One after the other in the backward pass: their memory is not added."""
    memory = model(parallel__recompute="full")
    block, embedding, head = memory.costs.block, memory.costs.embedding, memory.costs.head
    found = memory.stage(0, (8,), (0,))
    assert found.logits == head.logits_bytes + head.working_bytes > block.working_bytes
    assert found.working == 0
    assert found.activations == 8 * block.activation_bytes + head.activation_bytes
    # A large block; what it has recomputed is freed before the embedding's gradient is there.
    wide = model(parallel__recompute="full", model__ffn_hidden_size=4096)
    found, block = wide.stage(0, (8,), (8,)), wide.costs.block
    assert found.logits == 0
    again = block.activation_bytes - block.recompute_bytes
    assert found.working == block.working_bytes + again
    large = model(data__vocab_size=2**20, parallel__pipeline=2)
    found, embedding = large.stage(0, (4,), (0,)), large.costs.embedding
    assert found.working == embedding.working_bytes - 4 * large.costs.block.activation_bytes
    assert large.stage(1, (4,), (0,)).logits > 0


def test_all_batches_of_a_step_are_on_the_device() -> None:
    """Tokens on the first stage, labels on the last; 8 bytes each."""
    many, few = (
        model(parallel__pipeline=2, training__global_batch_size=size).stage(0, (4,), (0,)).inputs
        for size in (64, 32)
    )
    tokens = 32 * 32
    assert many - few == 8 * tokens


def test_light_recomputation_comes_before_full() -> None:
    memory = model(parallel__recompute="auto")
    none, light = (memory.stage(0, (8,), (0,), (n,)).total for n in (0, 8))
    assert memory.recomputation(0, (8,), none - 1) == ((0,), (1,))
    assert memory.recomputation(0, (8,), light) == ((0,), (8,))
    found = memory.recomputation(0, (8,), light - 1)
    assert found is not None
    assert found.full == (1,)
    assert found.light[0] < 7
    compiled = model(parallel__recompute="auto", kernels__compile=True)
    limit = compiled.stage(0, (8,), (4,)).total
    assert compiled.recomputation(0, (8,), limit) == ((4,), (0,))


def test_recompute_light_is_all_blocks_and_nothing_else() -> None:
    memory = model(parallel__recompute="light")
    assert memory.recomputation(0, (8,), None) == ((0,), (8,))
    assert memory.recomputation(0, (8,), 1.0) is None


def test_recompute_full_and_none_are_not_changed() -> None:
    assert model(parallel__recompute="full").recomputation(0, (8,), None) == ((8,), (0,))
    assert model(parallel__recompute="none").recomputation(0, (8,), None) == ((0,), (0,))
    assert model(parallel__recompute="none").recomputation(0, (8,), 1.0) is None


def test_dropout_keeps_a_byte_an_element_on_cuda() -> None:
    dry, dropped = (
        model_costs(small_config(model__dropout=rate), "triton").block.activation_bytes
        for rate in (0.0, 0.1)
    )
    assert dropped - dry == 2 * 64 * 32 * 2  # branches x hidden x sequence x micro-batch
