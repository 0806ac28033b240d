"""ZeRO's memory as predicted, beside the tensors of real runs on two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.config.checks import problems
from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.devices import DEVICES, device_named
from keel_megatron.layout.memory import MemoryModel
from keel_megatron.planner.advice import smallest_change
from keel_megatron.planner.plan import make_plan
from keel_megatron.planner.search import search
from tests.distributed import run_ranks
from tests.engines.deepspeed.memory_ranks import held_bytes
from tests.engines.deepspeed.ranks import ENGINES, needs_deepspeed
from tests.settings import settings, small_config

SHAPE: dict[str, Any] = {
    "model__blocks": 3,
    "model__hidden_size": 128,
    "model__ffn_hidden_size": 256,
}
SMALL_BUCKETS = {"deepspeed__bucket_size": 1000}
BF16 = {"training__precision": "bf16"}
# Stage 1 in fp32 drops the gradients of others before this looks; the plan counts them.
BF16_RUNS = ("ZeRO 1", "ZeRO 2, optimizer offloaded", "ZeRO 3", "ZeRO 3, optimizer offloaded")
FP32_RUNS = ("ZeRO 2, optimizer offloaded",)
RUNS: dict[str, dict[str, Any]] = {
    **{f"bf16, {name}": {**ENGINES[name], **SMALL_BUCKETS, **BF16} for name in BF16_RUNS},
    **{f"fp32, {name}": {**ENGINES[name], **SMALL_BUCKETS} for name in FP32_RUNS},
}


@pytest.fixture(scope="module")
def held() -> dict[str, int]:
    runs = [settings(**{**SHAPE, **overrides}) for overrides in RUNS.values()]
    ranks = run_ranks(2, held_bytes, runs)
    return {name: max(rank[n] for rank in ranks) for n, name in enumerate(RUNS)}


@needs_deepspeed
@pytest.mark.parametrize("name", RUNS)
def test_the_state_is_as_large_as_predicted(name: str, held: dict[str, int]) -> None:
    """Device and host together, which are one on a CPU; parameters collected for a block apart."""
    config = small_config(**{**SHAPE, **RUNS[name]})
    memory = MemoryModel(config, model_costs(config, "reference"), 2).stage(0, [3], [0])
    predicted = memory.parameters + memory.gradients + memory.optimizer + memory.host
    model = config.model
    largest = max(config.data.vocab_size, 2 * model.ffn_hidden_size) * model.hidden_size
    if config.deepspeed.offload_optimizer and config.deepspeed.zero_stage < 3:
        predicted += (2 if "bf16" in name else 4) * largest  # the device's spare matrix
    assert held[name] == pytest.approx(predicted, rel=0.03)


def test_the_larger_stage_and_offload_take_less_of_a_device() -> None:
    base = {"training__engine": "deepspeed", **BF16}
    sizes = []
    for stage in (1, 2, 3):
        for offload in (False, True):
            own = {"deepspeed__zero_stage": stage, "deepspeed__offload_optimizer": offload}
            config = small_config(**base, **own, **SMALL_BUCKETS)
            stage_memory = MemoryModel(config, model_costs(config, "reference"), 8).stage(
                0, [8], [0]
            )
            sizes.append((stage_memory.parameters + stage_memory.gradients, stage_memory))
            assert (stage_memory.host > 0) == offload
            assert (stage_memory.optimizer == 0) == offload
    states = [size for size, _memory in sizes[::2]]
    assert states == sorted(states, reverse=True)
    assert len(set(states)) == 3


def test_what_does_not_fit_is_offloaded() -> None:
    config = small_config(training__engine="deepspeed", **SHAPE, **SMALL_BUCKETS)
    whole = make_plan(config, 1, DEVICES["h100"]).partition.worst_memory.memory
    need = (whole.total - whole.optimizer // 2) / 1e9
    tight = device_named("h100", memory_gb=need, reserved_gb=1e-9)
    plan = make_plan(config, 1, tight)
    assert not plan.fits
    found = smallest_change(plan, more_gpus=False)
    assert found is not None
    overrides, other = found
    assert other.fits
    assert "deepspeed.offload_optimizer=true" in overrides


def test_a_search_offers_what_the_engine_can_do() -> None:
    config = small_config(training__engine="deepspeed")
    for candidate in search(config, 4, DEVICES["h100"]).best:
        assert not list(problems(candidate.plan.config, candidate.plan.gpus))
