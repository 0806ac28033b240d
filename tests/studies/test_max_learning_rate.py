"""The study of the largest learning rate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from keel_megatron.errors import UserError
from keel_megatron.studies import max_learning_rate as study
from keel_megatron.studies.divergence import smooth
from keel_megatron.studies.grid import Axes, Row
from tests.settings import small_config

STEPS, CEILING = 500, 5e-2


def row(rule: str, until: int, seed: int = 0) -> Row:
    """A run that falls until a step, and is lost after it."""
    losses = [3.0 + 4.0 * math.exp(-n / 40) for n in range(until)] + [6.8] * (STEPS - until)
    curve = smooth(losses, STEPS)
    return {
        "run": f"{rule}-{seed}",
        "rule": rule,
        "sub_layers": 64,
        "ceiling": CEILING,
        "seed": seed,
        "ramp_steps": STEPS,
        "curve_steps": list(curve.steps),
        "curve_losses": list(curve.losses),
        "lost": None,
    }


def test_the_maximum_is_the_rate_at_the_step_before_the_divergence() -> None:
    rows = [row("keel", STEPS), row("pre_ln", 300), row("post_ln", 100)]
    found = {one["rule"]: study.max_rate(one, verdict) for one, verdict in study.verdicts(rows)}
    assert found["keel"] == CEILING
    assert found["pre_ln"] == pytest.approx(CEILING * 300 / STEPS, rel=0.03)
    assert found["post_ln"] == pytest.approx(CEILING * 100 / STEPS, rel=0.1)


def test_the_table_has_every_seed_and_the_papers_figure(tmp_path: Path) -> None:
    rows = [row("keel", STEPS), row("keel", 400, 1), row("pre_ln", 300), row("pre_ln", 300, 1)]
    text = study.table(rows)
    (line,) = (line for line in text.splitlines() if "keel" in line)
    assert "5.00e-2" in line
    assert "4.0" in line
    assert line.rstrip(" |").endswith("1.01e-2")
    study.picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_ramp_is_the_whole_run() -> None:
    config = small_config(training__steps=100)
    found = study.study(config, Axes((), (64,)), (5e-2, 1e-3))
    assert [point.labels["rule"] for point in found.points[:6]] == list(study.PAPER_RULES)
    assert len(found.points) == 12
    for point in found.points:
        assert point.overrides["schedule.warmup_steps"] == 99
        assert point.overrides["schedule.decay"] == "constant"
        assert point.overrides["optimizer.learning_rate"] == point.labels["ceiling"]
    with pytest.raises(UserError, match="--ceiling"):
        study.study(config, Axes((), (64,)), (0.0,))
