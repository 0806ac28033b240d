"""The same run at every layout: equal losses and gradient norms, on real gloo ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.settings import settings
from tests.training.ranks import train_steps

STEPS = 4

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel__tensor": 2}),
    "tp2-sp": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pp2": (2, {"parallel__pipeline": 2}),
    "pp3-uneven": (3, {"parallel__pipeline": 3}),
    "pp2-vpp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "dp2": (2, {}),
    "dp2-replicated-optimizer": (2, {"parallel__distributed_optimizer": False}),
    "tp2-pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "tp2-sp-pp2-vpp2": (
        4,
        {
            "parallel__tensor": 2,
            "parallel__sequence": True,
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
        },
    ),
}


@cache
def alone(residual: str, tied: bool) -> list[tuple[float, float]]:
    sections = settings(model__residual=residual, model__tie_embeddings=tied)
    return run_ranks(1, train_steps, sections, STEPS)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_like_one_process(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    ranks = run_ranks(world_size, train_steps, settings(**overrides), STEPS)
    for found in ranks:
        assert found == ranks[0], "every rank reports the same"
        for here, there in zip(found, alone("keel", False), strict=True):
            assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.parametrize(("residual", "tied"), [("pre_ln", False), ("keel", True)])
def test_other_models_train_the_same_at_tp2_pp2(residual: str, tied: bool) -> None:
    sections = settings(
        model__residual=residual,
        model__tie_embeddings=tied,
        parallel__tensor=2,
        parallel__pipeline=2,
    )
    found = run_ranks(4, train_steps, sections, STEPS)[0]
    for here, there in zip(found, alone(residual, tied), strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def test_bf16_trains_close_to_fp32() -> None:
    sections = settings(
        training__precision="bf16",
        parallel__pipeline=2,
        parallel__virtual_pipeline=2,
    )
    found = run_ranks(2, train_steps, sections, STEPS)[0]
    for here, there in zip(found, alone("keel", False), strict=True):
        assert here == pytest.approx(there, rel=5e-3)
