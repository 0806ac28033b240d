"""Counts of Muon's update against what the update does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keel_megatron.architecture.block_weights import block_weights
from keel_megatron.config.run import RunConfig
from keel_megatron.engines.megatron.muon.update import Settings, Stack, update
from keel_megatron.layout import newton_schulz
from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.memory import MemoryModel
from keel_megatron.layout.muon import MuonLoad, muon_load
from keel_megatron.planner.trace.counts import NO_KERNEL, flops
from tests.memory import Watch
from tests.settings import settings

BLOCKS = 8


def run(**overrides: Any) -> RunConfig:
    return RunConfig.model_validate(
        settings(**{"optimizer__name": "muon", "model__blocks": BLOCKS, **overrides})
    )


def update_of(config: RunConfig) -> Callable[[], None]:
    """An update of all weights of all blocks."""
    ones, stacks = torch.ones(BLOCKS), []
    for weight in block_weights(config.model):
        values = torch.randn(3, BLOCKS, *weight.shape)
        stacks.append(Stack(weight, *values.unbind(0), ones, ones))
    chosen = Settings(1e-3, 0.1, 0.95, True, config.optimizer.ns_steps, "original")
    return lambda: update(stacks, chosen, torch.float32)


class Counted(TorchDispatchMode):
    """FLOPs and kernels: operators, and the copy with which a product that adds begins."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.kernels = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        self.flops += flops(name, args)
        launched = not func.is_view and name not in NO_KERNEL
        self.kernels += launched + (name == "aten.baddbmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit", [newton_schulz.TEMPORARY_BYTES, 300_000])
def test_work_and_temporary_memory_are_those_of_an_update(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newton_schulz, "TEMPORARY_BYTES", limit)
    # Iterations of its own: what was counted under another limit is kept.
    config = run(optimizer__ns_steps=3 if limit == 300_000 else 4)
    load, step = muon_load(config, BLOCKS, 1, 4), update_of(config)
    with Counted() as counted:
        step()
    assert counted.flops == load.update.flops
    assert counted.kernels == pytest.approx(load.update.kernels, rel=0.1)
    with Watch() as watch:
        step()
    assert load.temporary_bytes <= watch.peak <= 1.02 * load.temporary_bytes
    assert load.temporary_bytes <= limit


def test_a_tensor_group_shares_the_work() -> None:
    config, halves = run(), run(parallel__tensor=2)
    whole, half = (muon_load(one, BLOCKS, 1, 2) for one in (config, halves))
    assert half.update.flops == whole.update.flops / 2
    assert half.buffer == whole.buffer / 2
    # Its shards go to their ranks and come back: half of them stay.
    elements = BLOCKS * sum(weight.numel for weight in block_weights(config.model))
    assert half.update.communication_bytes == 2 * 2 * elements / 2 / 2
    assert whole.update.communication_bytes == 0


def test_adamw_has_none() -> None:
    assert muon_load(run(optimizer__name="adamw"), BLOCKS, 2, 2) == MuonLoad()
    assert muon_load(run(), 0, 2, 2).buffer == 0


@pytest.mark.parametrize(("precision", "weight", "state"), [("bf16", 2, 8), ("fp32", 4, 4)])
def test_states_of_an_owner(precision: str, weight: int, state: int) -> None:
    """A weight, its gradient, and of what the replica owns the momentum and in bf16 the master."""
    config = run(training__precision=precision, parallel__distributed_optimizer=False)
    memory = MemoryModel(config, model_costs(config), 2)
    some, none = (memory.stage(0, (blocks,), (0,)) for blocks in (BLOCKS, 0))
    block = memory.costs.block
    matrices, vectors = BLOCKS * block.parameters, BLOCKS * block.vector_parameters
    assert some.parameters - none.parameters == weight * matrices + 4 * vectors
    assert some.gradients - none.gradients == 4 * (matrices + vectors)
    assert some.optimizer - none.optimizer == state * matrices / 2 + 8 * vectors
