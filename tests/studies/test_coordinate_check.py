"""The coordinate check: its grid, what it reads of a run, exponents of depth, and epsilon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel_megatron.architecture.residual import RULES
from keel_megatron.depth.profile import QUANTITIES, DepthProfile
from keel_megatron.errors import UserError
from keel_megatron.studies.coordinate_check import (
    MEASURED,
    exponents,
    measured,
    picture,
    study,
    table,
)
from keel_megatron.studies.grid import Axes, Row
from keel_megatron.tracking.metrics import MetricsFile
from keel_megatron.tracking.records import StepRecord
from keel_megatron.tracking.run_log import METRICS_FILE
from tests.settings import small_config


def test_the_grid_has_every_rule_depth_and_epsilon() -> None:
    found = study(small_config(), Axes(("complete_p", "keel"), (16, 64)), 7, ["1", "1/L", "100/L"])
    assert [point.name for point in found.points] == [
        f"{rule}-{sub_layers}-eps{factor * 1e-8:.3g}"
        for rule in ("complete_p", "keel")
        for sub_layers in (16, 64)
        for factor in (1, 1 / sub_layers, 100 / sub_layers)
    ]
    changes = found.points[4].overrides
    assert changes["model.blocks"] == 32
    assert changes["optimizer.epsilon"] == pytest.approx(1e-8 / 64)
    assert changes["training.steps"] == 7
    # CompleteP of 2 blocks divides it by 32 / 2 by itself, Keel does not.
    for point, factor in ((found.points[4], 16), (found.points[10], 1)):
        assert point.labels["block_epsilon"] == pytest.approx(1e-8 / 64 / factor)
    everything = study(small_config(), Axes((), (16,)))
    assert [point.labels["rule"] for point in everything.points] == list(RULES)


def test_epsilons_that_differ_in_later_digits_are_points_of_their_own() -> None:
    found = study(small_config(), Axes(("keel",), (12,)), 7, ["1/L", "0.0833", "0.08330", "1/L"])
    epsilons = [point.overrides["optimizer.epsilon"] for point in found.points]
    assert epsilons == pytest.approx([1e-8 / 12, 0.0833e-8], rel=1e-9)
    names = [point.name for point in found.points]
    assert names[0] == "keel-12-eps8.33e-10"
    assert len(set(names)) == 2


@pytest.mark.parametrize("factor", ["0", "-1", "L", "1/l", "1/", "nan", "inf"])
def test_a_factor_that_is_none_is_refused(factor: str) -> None:
    with pytest.raises(UserError, match=f"--epsilons: {factor} must be a positive number"):
        study(small_config(), Axes(("keel",), (16,)), epsilons=[factor])


def write_run(folder: Path, sub_layers: int) -> None:
    """Two steps; every quantity is step x (1 + l), the gradient's norm 4."""
    depth = 1.0 + np.arange(sub_layers)
    with MetricsFile(folder / METRICS_FILE) as log:
        for step in (1, 2):
            log.write(StepRecord(step, 5.0 - step, 4.0, 1e-3, 2, 64, 1.0, 1.0, 1.0, 0.1))
            values = dict.fromkeys(QUANTITIES, step * depth)
            log.write(DepthProfile.of(step, values, {}))


def test_a_run_s_sizes_are_those_of_its_first_and_last_profile(tmp_path: Path) -> None:
    point = study(small_config(), Axes(("keel",), (8,))).points[0]
    assert measured(point, tmp_path, 1.0)["last"] == dict.fromkeys(MEASURED)
    write_run(tmp_path, 8)
    found = measured(point, tmp_path, 1.0)
    # The last sub-layer; the median over blocks 1 to 3; a gradient clipped from 4 to 1.
    assert found["first"] == {
        "stream_rms": 8.0,
        "branch_rms": 5.5,
        "update_size": 5.5,
        "update_to_weight": 5.5,
        "gradient_rms": 5.5 / 4,
    }
    assert found["last"]["branch_rms"] == 11.0
    assert measured(point, tmp_path, 0.0)["last"]["gradient_rms"] == 11.0, "no clipping"
    assert found["losses"] == [4.0, 3.0]
    assert found["places"] == [0.125, 0.375, 0.625, 0.875]
    assert found["over_depth"]["branch_rms"] == [3.0, 7.0, 11.0, 15.0]


def test_a_deep_run_has_means_over_neighbours(tmp_path: Path) -> None:
    write_run(tmp_path, 256)
    found = measured(study(small_config(), Axes(("keel",), (256,))).points[0], tmp_path, 1.0)
    assert len(found["places"]) == 64
    assert found["over_depth"]["stream_rms"][:2] == [5.0, 13.0]
    assert found["places"][0] == 2 / 256


POWERS = dict(zip(MEASURED, (0.0, 0.5, -1.0, 0.25, -0.5), strict=True))


def rows(rule: str, epsilons: tuple[float, ...] = (1e-8,), seeds: int = 2) -> list[Row]:
    """Sizes that are powers of the depth; the update shrinks a little with epsilon."""
    return [
        {
            "rule": rule,
            "sub_layers": sub_layers,
            "epsilon": epsilon,
            "block_epsilon": epsilon,
            "seed": seed,
            "steps": 10,
            "loss": 4.0 + epsilon,
            "diverged": False,
            "first": dict.fromkeys(MEASURED, 1.0),
            "last": sizes(sub_layers, epsilon),
            "places": [0.25, 0.75],
            "over_depth": {name: [1.0, None] for name in MEASURED},
        }
        for sub_layers in (16, 64, 256)
        for epsilon in epsilons
        for seed in range(seeds)
    ]


def sizes(sub_layers: int, epsilon: float) -> dict[str, Any]:
    found: dict[str, Any] = {name: sub_layers**power for name, power in POWERS.items()}
    found["update_to_weight"] *= 1.0 if epsilon < 1e-6 else 0.75
    return found


def test_exponents_are_those_of_the_depth() -> None:
    (found,) = exponents(rows("keel")).values()
    assert found == pytest.approx(POWERS, abs=1e-12)
    one_depth = [row for row in rows("keel") if row["sub_layers"] == 16]
    assert exponents(one_depth) == {}
    lost = rows("keel")
    lost[0]["last"] = lost[1]["last"] = dict.fromkeys(MEASURED)
    assert exponents(lost)["keel"] == dict.fromkeys(MEASURED)


def test_the_table_has_sizes_exponents_and_what_epsilon_changes() -> None:
    text = table(rows("keel", (1e-6, 1e-8)) + rows("pre_ln"))
    assert "| keel | 16 | 1 → 1 | 1 → 4 | 1 → 0.062 | 1 → 1.5 | 1 → 0.25 | 4.000 ± 0.000 |" in text
    assert "| pre_ln | +0.00 | +0.50 | -1.00 | +0.25 | -0.50 |" in text
    assert "| keel | 16 | 1.0e-08 | 2.5e+07 | 1.0000 | - |" in text
    assert "| keel | 256 | 1.0e-06 | 6.25e+04 | 0.7500 | +0.000 |" in text
    assert "| pre_ln | 16 | 1.0e-08 | 2.5e+07" not in text, "it has one epsilon"


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    diverged = rows("post_ln", seeds=1)
    for row in diverged:
        row |= {"last": dict.fromkeys(MEASURED), "places": [], "over_depth": {}, "steps": 0}
    for number, drawn in enumerate([rows("keel") + diverged, rows("keel", (1e-8, 1e-5))]):
        picture(drawn, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
