"""The study of a bf16 stream: its grid, what it reads of a run, and its answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from keel_megatron.depth.profile import QUANTITIES, DepthProfile
from keel_megatron.errors import UserError
from keel_megatron.studies.grid import Axes, Row
from keel_megatron.studies.results import Spread
from keel_megatron.studies.stream_precision import answer, measured, picture, study, table
from keel_megatron.tracking.metrics import MetricsFile
from keel_megatron.tracking.run_log import METRICS_FILE
from tests.settings import small_config


def test_the_grid_has_every_stream_and_alpha_once() -> None:
    found = study(small_config(), Axes((), (64,)), ["bf16"], ["32", "64", "auto"])
    assert [point.name for point in found.points] == [
        "keel-64-alpha32-fp32",
        "keel-64-alpha32-bf16",
        "keel-64-alpha64-fp32",
        "keel-64-alpha64-bf16",
        "pre_ln-64-fp32",
        "pre_ln-64-bf16",
    ]
    keel, pre_ln = found.points[1], found.points[-1]
    assert keel.overrides["model.alpha"] == 32.0
    assert keel.overrides["model.stream"] == "bf16"
    assert keel.overrides["model.blocks"] == 32
    assert "model.alpha" not in pre_ln.overrides


def test_auto_is_the_rule_s_own_alpha() -> None:
    found = study(small_config(), Axes(("deepnorm",), (256,)), ["fp32"], ["auto"])
    assert [point.labels["alpha"] for point in found.points] == [4.0]


@pytest.mark.parametrize(
    ("streams", "alphas", "message"),
    [
        (["bf16"], ["0"], "--alphas: 0 must be auto or a positive number"),
        (["bf16"], ["L"], "--alphas: L must be auto"),
        (["bf16"], ["nan"], "--alphas: nan must be auto"),
    ],
)
def test_an_impossible_grid_is_refused(streams: list[str], alphas: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        study(small_config(), Axes((), (8,)), streams, alphas)


def test_a_run_s_branches_are_read_from_its_last_profile(tmp_path: Path) -> None:
    point = study(small_config(), Axes((), (8,))).points[0]
    assert measured(point, tmp_path) == {
        "branch_rms": None,
        "update_size": None,
        "update_kept": None,
    }
    depth = np.arange(8.0)
    with MetricsFile(tmp_path / METRICS_FILE) as log:
        for step in (1, 2):
            values = dict.fromkeys(QUANTITIES, step * depth)
            log.write(DepthProfile.of(step, values, {"update_kept": [True] * 8}))
    found = measured(point, tmp_path)
    assert found == {"branch_rms": 9.0, "update_size": 9.0, "update_kept": None}


def rows(losses: dict[tuple[str, float | None, str], float], seeds: int = 3) -> list[Row]:
    """Rows with losses that scatter by 0.001, and much more over seeds, in pairs."""
    return [
        {
            "rule": rule,
            "sub_layers": 64,
            "alpha": alpha,
            "stream": stream,
            "seed": seed,
            "loss": loss + 0.1 * seed + 0.001 * ((seed * 7 + index) % 3),
            "validation_loss": loss,
            "diverged": False,
            "branch_rms": 0.5,
            "update_size": 0.01,
            "update_kept": None if stream == "fp32" else 0.7,
        }
        for index, ((rule, alpha, stream), loss) in enumerate(losses.items())
        for seed in range(seeds)
    ]


LOSSES: dict[tuple[str, float | None, str], float] = {
    ("keel", 64.0, "fp32"): 4.0,
    ("keel", 64.0, "bf16"): 4.0,
    ("keel", 64.0, "bf16_add"): 4.2,
    ("keel", 1024.0, "fp32"): 4.1,
    ("keel", 1024.0, "bf16"): 4.5,
    ("keel", 1024.0, "bf16_add"): 4.7,
    ("pre_ln", None, "fp32"): 4.5,
    ("pre_ln", None, "bf16"): 4.5,
    ("pre_ln", None, "bf16_add"): 4.5,
}


def test_the_table_says_what_becomes_of_the_advantage() -> None:
    text = table(rows(LOSSES))
    assert "| 64 | keel | 64 | bf16 | 4.101 ± 0.100 | no difference (" in text
    assert "| 64 | keel | 1024 | bf16 | 4.601 ± 0.100 | +0.4" in text, "of the same seed"
    answers = {
        tuple(cells[3:5]): cells[-2]
        for cells in ([c.strip() for c in line.split("|")] for line in text.splitlines())
        if len(cells) == 9
    }
    assert answers["64", "bf16"] == "remains"
    assert answers["64", "bf16_add"] == "shrinks"
    assert answers["1024", "bf16"] == "vanishes"
    assert answers["1024", "bf16_add"] == "is reversed"
    assert answers["64", "fp32"] == ""
    assert "| 64 | keel | 1024 | bf16 | no difference (" in text


def test_one_seed_answers_nothing() -> None:
    text = table(rows(LOSSES, seeds=1))
    assert "unknown" in text
    assert "vanishes" not in text


def test_without_pre_ln_or_losses_there_is_still_a_table(tmp_path: Path) -> None:
    some = [row for row in rows(LOSSES) if row["rule"] == "keel"]
    for row in some[:6]:
        row.update(loss=None, validation_loss=None, diverged=True, branch_rms=None)
    text = table(some)
    assert "3 of 3 diverged" in text
    assert "advantage" not in text
    picture(some, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("own", "wide", "expected"),
    [
        (Spread(0.5, 0.01, 3), Spread(0.5, 0.01, 3), "remains"),
        (Spread(0.7, 0.01, 3), Spread(0.5, 0.01, 3), "grows"),
        (Spread(0.01, 0.05, 3), Spread(0.5, 0.01, 3), "vanishes"),
        (Spread(0.5, 0.01, 3), Spread(0.0, 0.1, 3), "was none"),
        (Spread(0.5, 0.01, 3), Spread(-0.5, 0.01, 3), "was none"),
        (Spread(0.5, float("nan"), 1), Spread(0.5, 0.01, 3), "unknown"),
        (Spread(float("nan"), float("nan"), 0), Spread(0.5, 0.01, 3), "unknown"),
    ],
)
def test_answers(own: Spread, wide: Spread, expected: str) -> None:
    assert answer(own, wide) == expected
