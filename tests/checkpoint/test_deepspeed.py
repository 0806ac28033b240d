"""The DeepSpeed engine's checkpoints: exact resume, and going on with the other engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint import folder, manifest
from tests.checkpoint.ranks import Ran, run_in_turn
from tests.checkpoint.test_resume import SAVED, forget_the_end, sections
from tests.engines.deepspeed.ranks import needs_deepspeed, zero

pytestmark = needs_deepspeed

BF16 = {"training__precision": "bf16"}
SAME: dict[str, dict[str, Any]] = {
    "zero1-bf16": {**zero(1), **BF16},
    "zero2-offload-waiting": {**zero(2, offload=True), "checkpoint__async_save": False},
    "zero3-bf16": {**zero(3), **BF16},
    "zero3-offload-tp2": {**zero(3, offload=True, parameters=True), "parallel__tensor": 2},
}
# Who goes on from whose checkpoint, at two processes.
FROM_MEGATRON = {"zero1": zero(1), "zero3-tp2": {**zero(3), "parallel__tensor": 2}}
FROM_ZERO = {"dp2": {}, "pp2": {"parallel__pipeline": 2}, "zero1-tp2": SAME["zero1-bf16"]}
MEGATRON = {"optimizer__clip_grad": 0.25}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def same(runs: Path) -> dict[str, tuple[list[Ran], list[Ran]]]:
    """Of each run both ranks undisturbed, and from the middle on in other processes."""
    configs = [sections(runs, n, model__dropout=0.1, **o) for n, o in SAME.items()]
    whole = run_in_turn(2, configs)
    for name in SAME:
        forget_the_end(runs / name)
    again = run_in_turn(2, configs)
    return dict(zip(SAME, zip(whole, again, strict=True), strict=True))


@pytest.mark.parametrize("name", SAME)
def test_it_goes_on_to_the_last_bit(
    name: str, same: dict[str, tuple[list[Ran], list[Ran]]]
) -> None:
    """Losses and gradient norms; then weights, masters, moments and the count on both ranks."""
    for whole, again in zip(*same[name], strict=True):
        assert whole.error is None
        assert again.error is None
        assert again.resumed == f"step_{SAVED:08d}"
        assert again.losses == whole.losses[SAVED:]
        assert again.digest == whole.digest


@pytest.fixture(scope="module")
def origins(runs: Path) -> dict[str, Ran]:
    """A run of each engine, to its end."""
    configs = {
        "megatron": sections(runs, "megatron", **MEGATRON),
        "zero2": sections(runs, "zero2", **zero(2)),
    }
    found = run_in_turn(2, list(configs.values()))
    for name in configs:
        forget_the_end(runs / name)
    return {name: ranks[0] for name, ranks in zip(configs, found, strict=True)}


@pytest.fixture(scope="module")
def continued(runs: Path, origins: dict[str, Ran]) -> dict[str, Ran]:
    """The end of each of those runs with the other engine, each from its own copy."""
    configs = {}
    for origin, others in (("megatron", FROM_MEGATRON), ("zero2", FROM_ZERO)):
        for name, overrides in others.items():
            copy = f"{origin}-{name}"
            shutil.copytree(runs / origin, runs / copy)
            own = {**MEGATRON, **overrides, "training__precision": "fp32"}
            configs[copy] = sections(runs, copy, **own)
    found = run_in_turn(2, list(configs.values()))
    return {name: ranks[0] for name, ranks in zip(configs, found, strict=True)}


@pytest.mark.parametrize(
    "name", [f"megatron-{n}" for n in FROM_MEGATRON] + [f"zero2-{n}" for n in FROM_ZERO]
)
def test_the_other_engine_goes_on(
    name: str, continued: dict[str, Ran], origins: dict[str, Ran]
) -> None:
    origin = origins[name.split("-")[0]]
    assert origin.error is None
    assert continued[name].error is None
    assert continued[name].resumed == f"step_{SAVED:08d}"
    for here, there in zip(continued[name].losses, origin.losses[SAVED:], strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def test_both_engines_write_the_same_tensors(runs: Path, origins: dict[str, Ran]) -> None:
    del origins  # the runs
    indices = []
    for name in ("megatron", "zero2"):
        tensors = manifest.read_json(folder.step_folder(runs / name, SAVED) / manifest.INDEX)
        indices.append({key: (entry["dtype"], entry["shape"]) for key, entry in tensors.items()})
    assert indices[0] == indices[1]
