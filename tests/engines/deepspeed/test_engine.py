"""The DeepSpeed engine trains like the Megatron engine, on real gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import yaml
from keel_megatron.config.checks import problems
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import (
    ENGINES,
    LAYOUTS,
    MEGATRON,
    Watched,
    forgetful,
    needs_deepspeed,
    own_reads,
    watched_runs,
)
from tests.settings import settings, small_config
from tests.training import faults
from tests.training.matrix import deviation

pytestmark = needs_deepspeed

STEPS = 3
SMALL: dict[str, Any] = {"model__blocks": 3, "model__num_query_groups": 2}
TP2 = {"parallel__tensor": 2}
# Recomputed, and with a matrix that two modules share: both are hard for ZeRO 3's hooks.
HARD = {"parallel__recompute": "full", "model__tie_embeddings": True}
ALONE = {
    "megatron": MEGATRON,
    "megatron, hard": {**MEGATRON, **HARD},
    # Of the 64 tokens of a micro-batch 25 go through the head at once.
    "ZeRO 3, hard": {**ENGINES["ZeRO 3"], **HARD, "kernels__logits_mib": 0.05},
    **ENGINES,
}
# Many groups of parameters, and rules that need more than a norm in front of a branch.
GROUPED: dict[str, Any] = {
    "optimizer__rates": {"matrices": 0.5, "embeddings": 2.0, "head": 0.25, "norms": 4.0},
    "optimizer__depth_rates": [{"blocks": [1, 1], "factor": 0.5}],
    "optimizer__decay_norms": True,
    "optimizer__weight_decay": 1.0,
}
RULES: dict[str, dict[str, Any]] = {
    "peri_ln": {**GROUPED, "model__residual": "peri_ln", "model__embedding_norm": True},
    "layer_norm_scaling": {**GROUPED, "model__residual": "layer_norm_scaling"},
    "complete_p": {**GROUPED, "model__residual": "complete_p", "optimizer__epsilon": 1e-4},
    # A mix of 8 streams has 80 weights, more than a norm of width 64.
    "streams": {**GROUPED, "model__residual": "hyper_connections", "model__expansion_rate": 8},
}
# Offloading beside DP 2 and TP 2 is the slow test's.
QUICK = {name: ENGINES[name] for name in ("ZeRO 1", "ZeRO 2", "ZeRO 3")}
OFFLOADED = {name: ENGINES[name] for name in (*QUICK, "ZeRO 2, optimizer offloaded")}
TWO = {
    "megatron": MEGATRON,
    "megatron, TP 2": {**MEGATRON, **TP2},
    "ZeRO 1, TP 2": {**ENGINES["ZeRO 1"], **TP2},
    "ZeRO 3, TP 2": {**ENGINES["ZeRO 3"], **TP2, "kernels__logits_mib": 0.025},
    **{
        f"{engine}, {name}": {**overrides, **rule}
        for engine, overrides in {"megatron": MEGATRON, **QUICK}.items()
        for name, rule in RULES.items()
    },
    **OFFLOADED,
}


def _watched(size: int, runs: dict[str, dict[str, Any]], *more: Any) -> dict[str, Watched]:
    sections = [settings(**{**SMALL, **overrides}) for overrides in runs.values()]
    ranks = run_ranks(size, watched_runs, sections, STEPS, *more)
    assert all(rank[n].steps == ranks[0][n].steps for rank in ranks for n in range(len(runs)))
    return dict(zip(runs, ranks[0], strict=True))


@pytest.fixture(scope="module")
def alone() -> dict[str, Watched]:
    return _watched(1, ALONE)


@pytest.fixture(scope="module")
def two() -> dict[str, Watched]:
    return _watched(2, TWO)


def _agree(found: Watched, expected: Watched) -> None:
    """Losses, norms, and what the guard and the depth profiles see."""
    for here, there in zip(found.steps, expected.steps, strict=True):
        assert here == pytest.approx(there, rel=1e-5)
    assert found.places == pytest.approx(expected.places, rel=1e-4)
    for quantity, values in expected.profile.values.items():
        here = found.profile.values[quantity]
        assert np.array_equal(np.ma.getmaskarray(here), np.ma.getmaskarray(values))
        np.testing.assert_allclose(
            here.compressed(), values.compressed(), rtol=1e-4, atol=1e-7, err_msg=quantity
        )


@pytest.mark.parametrize("name", [name for name in ALONE if name.startswith("ZeRO")])
def test_one_process_trains_like_the_megatron_engine(name: str, alone: dict[str, Watched]) -> None:
    variant = name.partition(", ")[2]
    _agree(alone[name], alone.get(f"megatron, {variant}", alone["megatron"]))


@pytest.mark.parametrize("name", [name for name in TWO if name.startswith("ZeRO")])
def test_two_ranks_train_like_the_megatron_engine(name: str, two: dict[str, Watched]) -> None:
    variant = name.partition(", ")[2]
    _agree(two[name], two.get(f"megatron, {variant}", two["megatron"]))


def test_every_step_was_clipped(alone: dict[str, Watched]) -> None:
    limit = MEGATRON["optimizer__clip_grad"]
    assert all(norm > limit for _loss, norm in alone["megatron"].steps[:STEPS])


def test_lost_gradients_would_be_caught(alone: dict[str, Watched]) -> None:
    """With the last micro-batch's gradients alone the figures are far outside the bound."""
    sections = settings(**SMALL, **ENGINES["ZeRO 2"])
    (lost,) = run_ranks(1, forgetful, sections, STEPS)
    kept = alone["megatron"].steps[:STEPS]
    assert lost[0][0] == pytest.approx(kept[0][0], rel=1e-6)  # nothing learned yet
    apart = deviation(lost, kept)
    assert apart.loss > 1e-4
    assert apart.grad_norm > 0.1


def test_the_engine_waits_for_a_step_once() -> None:
    """Loss, gradient norm and votes are read together; ZeRO's own step reads more."""
    runs = [settings(**SMALL, **overrides) for overrides in OFFLOADED.values()]
    (found,) = run_ranks(1, own_reads, runs)
    assert found == [["tolist"]] * len(runs)


def test_a_refused_step_leaves_no_trace(alone: dict[str, Watched]) -> None:
    """What the guard refuses changes neither weights nor moments nor what is accumulated."""
    for name, found in _watched(1, ENGINES, 1).items():
        assert found.steps == alone[name].steps, name


@pytest.mark.parametrize(
    "name", ["ZeRO 3", pytest.param("ZeRO 2, optimizer offloaded", marks=pytest.mark.slow)]
)
def test_a_rollback_returns_to_the_checkpoint(name: str, tmp_path: Path) -> None:
    """As tests/training/test_guard.py: into an engine that has trained on since."""
    sections = settings(
        **SMALL,
        **ENGINES[name],
        training__runs_dir=str(tmp_path / "runs"),
        training__steps=5,
        data__cache_dir=str(tmp_path / "data"),
        data__text=torch.__file__,
        model__dropout=0.1,
        checkpoint__every=2,
        guard__action="rollback",
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    (reported, expected, log), _ = run_ranks(2, faults.roll_back, path)
    assert reported == expected
    assert "guard, step 4 (rollback): grad_norm is inf; gradients are not finite in" in log
    assert "guard: back at step 2; the data continues after sequence 64" in log


@pytest.mark.slow
def test_bf16_trains_close_to_the_megatron_engine() -> None:
    """DeepSpeed rounds the gains to bf16 in the passes: a difference of bf16's own size."""
    bf16 = {"training__precision": "bf16"}
    runs = {name: {**o, **bf16} for name, o in {"megatron": MEGATRON, **OFFLOADED}.items()}
    found = _watched(2, runs)
    for name in OFFLOADED:
        apart = deviation(found[name].steps, found["megatron"].steps)
        assert apart.loss < 1e-3, (name, apart)
        assert apart.grad_norm < 1e-2, (name, apart)


@pytest.mark.slow
def test_the_whole_matrix_for_twenty_steps() -> None:
    """Every stage at every layout; `python tools/deepspeed_parity.py` prints its table."""
    for size, layout in LAYOUTS.values():
        runs = {name: {**o, **layout} for name, o in {"megatron": MEGATRON, **ENGINES}.items()}
        sections = [settings(**overrides) for overrides in runs.values()]
        ranks = run_ranks(size, watched_runs, sections, 20, timeout_seconds=1200.0)
        expected, *others = ranks[0]
        for name, found in zip(ENGINES, others, strict=True):
            apart = deviation(found.steps, expected.steps)
            assert max(apart.loss, apart.grad_norm) <= 1e-5, (layout, name, apart)


REFUSED = {
    "parallel.pipeline": {"parallel__pipeline": 2},
    "parallel.virtual_pipeline": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
    "parallel.sequence": {"parallel__tensor": 2, "parallel__sequence": True},
    "parallel.distributed_optimizer": {"parallel__distributed_optimizer": False},
    "deepspeed.offload_parameters": {"deepspeed__offload_parameters": True},
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_it_cannot_do_is_refused_with_the_reason(path: str) -> None:
    config = small_config(training__engine="deepspeed", **REFUSED[path])
    found = dict(problems(config))
    assert path in found
    megatron = small_config(**REFUSED[path])
    assert path == "deepspeed.offload_parameters" or path not in dict(problems(megatron))
