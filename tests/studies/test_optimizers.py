"""The study of Muon and AdamW: its grid, what it reads of a run, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel_megatron.depth.profile import QUANTITIES, DepthProfile
from keel_megatron.errors import UserError
from keel_megatron.studies.grid import Axes, Row
from keel_megatron.studies.optimizers import growth, measured, picture, study, table
from keel_megatron.tracking.metrics import MetricsFile
from keel_megatron.tracking.run_log import METRICS_FILE
from tests.settings import small_config


def test_the_grid_has_every_rule_optimizer_and_rate() -> None:
    found = study(small_config(training__steps=400), Axes((), (16,)), (1e-3, 1e-2))
    assert [point.name for point in found.points] == [
        f"{rule}-16-{optimizer}-lr{rate:g}"
        for rule in ("keel", "pre_ln")
        for optimizer in ("adamw", "muon")
        for rate in (1e-3, 1e-2)
    ]
    assert found.points[2].overrides == {
        "model.residual": "keel",
        "model.blocks": 8,
        "tracking.depth_every": 50,
        "optimizer.name": "muon",
        "optimizer.learning_rate": 1e-3,
    }


def test_an_impossible_grid_is_refused() -> None:
    with pytest.raises(UserError, match="--rates: 0 must be above 0"):
        study(small_config(), Axes((), (16,)), (0.0,))


def test_a_run_s_growth_is_that_of_its_profiles(tmp_path: Path) -> None:
    none = measured(tmp_path)
    assert (none["weights"], none["growth"], none["late_growth"], none["places"]) == (
        [],
        None,
        None,
        [],
    )
    with MetricsFile(tmp_path / METRICS_FILE) as log:
        for step, factor in ((1, 1.0), (50, 1.1), (100, 1.21)):
            weights = factor * np.array([0.1, 0.2, 0.3, 0.4])
            log.write(DepthProfile.of(step, dict.fromkeys(QUANTITIES, weights), {}))
    found = measured(tmp_path)
    assert found["profile_steps"] == [1, 50, 100]
    assert found["weights"] == pytest.approx([0.25, 0.275, 0.3025])
    assert found["growth"] == pytest.approx(0.21 / 99 * 1e5)
    assert found["late_growth"] == pytest.approx(0.1 / 50 * 1e5, rel=1e-5)
    assert found["over_depth"] == pytest.approx([1.21, 1.21])
    assert found["places"] == [0.25, 0.75]


def test_growth_is_in_percent_per_1000_steps() -> None:
    assert growth([1, 2001], [2.0, 2.1]) == pytest.approx(2.5)
    assert growth([1], [2.0]) is None


def rows(rule: str, optimizer: str, losses: dict[float, float], factor: float) -> list[Row]:
    """Two seeds at each rate, whose weights grow by a factor."""
    base: dict[str, Any] = {"rule": rule, "optimizer": optimizer, "sub_layers": 64}
    base |= {"profile_steps": [1, 400], "weights": [0.1, 0.1 * factor], "growth": 12.0}
    base |= {"late_growth": 3.0, "places": [0.25, 0.75], "over_depth": [factor, 2 * factor]}
    return [
        {
            **base,
            "rate": rate,
            "seed": seed,
            "loss": loss + 0.1 * seed,
            "validation_loss": loss + 0.1 * seed,
            "diverged": False,
        }
        for rate, loss in losses.items()
        for seed in (0, 1)
    ]


ALL = [
    *rows("keel", "adamw", {1e-3: 5.0, 3e-3: 4.5, 1e-2: 4.7}, 1.2),
    *rows("keel", "muon", {1e-3: 4.9, 3e-3: 4.0, 1e-2: 4.7}, 1.1),
]


def test_the_table_compares_best_rates_and_has_growth() -> None:
    lost = [row | {"rule": "post_ln", "diverged": True, "loss": None} for row in ALL[:2]]
    text = table([*ALL, *(row | {"validation_loss": None} for row in lost)])
    assert (
        "| 64 | keel | adamw | 0.003 | 4.550 ± 0.071 |  | 1.200 | 1.200 to 2.400 "
        "| +12.0 ± 0.0 % | +3.0 ± 0.0 % |"
    ) in text
    assert "| 64 | keel | muon | 0.003 | 4.050 ± 0.071 | -0.500 | 1.100 |" in text
    assert "| 64 | keel | muon | 1.10 | 1.10 | 1.10 |" in text, "at every rate"
    assert "| 64 | post_ln | adamw | - | diverged at every rate | - | - | - | - | - |" in text


def test_the_picture_has_a_row_per_depth(tmp_path: Path) -> None:
    without = [row | {"rule": "pre_ln", "weights": [], "over_depth": []} for row in ALL[:2]]
    deep = [row | {"sub_layers": 256} for row in ALL]
    picture([*ALL, *without, *deep], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
