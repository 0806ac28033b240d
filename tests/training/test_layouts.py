"""The same run at every layout: equal losses and gradient norms, on real gloo ranks."""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.model.residual import RULES
from tests.distributed import run_ranks
from tests.settings import settings
from tests.training.ranks import train_all

STEPS = 4
Found = list[tuple[float, float]]

TP2_SP_PP2_VPP2: dict[str, Any] = {
    "parallel__tensor": 2,
    "parallel__sequence": True,
    "parallel__pipeline": 2,
    "parallel__virtual_pipeline": 2,
}
# name -> (processes, overrides of the small Keel run)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "recompute": (1, {"parallel__recompute": "full"}),
    "tp2": (2, {"parallel__tensor": 2}),
    "tp2-sp": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pp2": (2, {"parallel__pipeline": 2}),
    "pp2-vpp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "dp2": (2, {}),
    "dp2-replicated-optimizer": (2, {"parallel__distributed_optimizer": False}),
    "pp3-uneven": (3, {"parallel__pipeline": 3}),
    "tp2-pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "tp2-sp-pp2-vpp2": (4, TP2_SP_PP2_VPP2),
}
# Every rule, and tied embeddings, at the hardest layout.
MODELS: dict[str, dict[str, Any]] = {
    **{rule: {"model__residual": rule} for rule in RULES},
    "keel-v1-tied": {"model__first_block": "v1", "model__tie_embeddings": True},
}


def trained(world_size: int, runs: dict[str, dict[str, Any]]) -> dict[str, Found]:
    """Rank 0's figures of each run; all ranks report the same."""
    sections = [settings(**overrides) for overrides in runs.values()]
    ranks = run_ranks(world_size, train_all, sections, STEPS, launches=len(sections))
    assert all(found == ranks[0] for found in ranks)
    return dict(zip(runs, ranks[0], strict=True))


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    """The models in one process; "keel" is also what every layout is held against."""
    return trained(1, MODELS)


@pytest.fixture(scope="module")
def spread() -> dict[str, Found]:
    """All layouts, those of the same number of processes in one launch."""
    found: dict[str, Found] = {}
    for world_size in {size for size, _overrides in LAYOUTS.values()}:
        chosen = {name: o for name, (size, o) in LAYOUTS.items() if size == world_size}
        found.update(trained(world_size, chosen))
    return found


@pytest.fixture(scope="module")
def hardest() -> dict[str, Found]:
    """Every model at TP 2 with sequence parallelism, PP 2, VPP 2 and full recompute."""
    extra = {**TP2_SP_PP2_VPP2, "parallel__recompute": "full"}
    return trained(4, {name: {**overrides, **extra} for name, overrides in MODELS.items()})


def agree(found: Found, expected: Found, tolerance: float) -> None:
    for here, there in zip(found, expected, strict=True):
        assert here == pytest.approx(there, rel=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_like_one_process(
    layout: str, spread: dict[str, Found], alone: dict[str, Found]
) -> None:
    agree(spread[layout], alone["keel"], 1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_the_same_at_the_hardest_layout(
    model: str, hardest: dict[str, Found], alone: dict[str, Found]
) -> None:
    agree(hardest[model], alone[model], 1e-5)


def test_no_two_models_are_the_same(alone: dict[str, Found]) -> None:
    assert len({tuple(found) for found in alone.values()}) == len(MODELS)


def test_bf16_trains_close_to_fp32(alone: dict[str, Found]) -> None:
    """Every rule in bf16, interleaved, with recompute: bf16 has 8 bits, so about 1 %."""
    extra = {
        "training__precision": "bf16",
        "parallel__pipeline": 2,
        "parallel__virtual_pipeline": 2,
        "parallel__recompute": "full",
    }
    runs = {name: {**overrides, **extra} for name, overrides in MODELS.items()}
    for name, found in trained(2, runs).items():
        agree(found, alone[name], 1e-2)
