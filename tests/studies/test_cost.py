"""What a grid costs: measured once per shape, and kept in the study's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keel_megatron.studies import cost
from keel_megatron.studies.cost import Times, cost_of
from keel_megatron.studies.grid import Grid, Point, make_grid
from tests.studies.test_grid import study, write


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    points = [
        Point(f"{blocks}-{rate}", {"model.blocks": blocks, "optimizer.learning_rate": rate}, {})
        for blocks in (2, 4)
        for rate in (1e-3, 1e-2)
    ]
    return make_grid(study(*points), write(tmp_path), [], tmp_path / "out", seeds=2)


class Planner:
    """Answers in place of the planner's process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answers = answers
        monkeypatch.setattr(cost, "_answer", self)
        monkeypatch.setattr(cost.time, "time", lambda: 100.0)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(request)
        return {"ready": 107.0, "runs": list(self.answers)}


def test_a_shape_is_measured_once(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(monkeypatch, {"step_seconds": 1.0}, {"step_seconds": 2.0})
    grid.out.mkdir()
    said: list[str] = []
    found = cost_of(grid, 2, say=said.append)
    assert said == ["measuring the step of 2 shapes (--plan stops after it)"]
    (request,) = planner.asked
    assert [run["settings"][0] for run in request["runs"]] == ["model.blocks=2", "model.blocks=4"]
    # 4 steps of 16 sequences; a validation of 64 has 4 batches without a backward pass.
    expected = [7 + (4 + 4 / 3) * step for step in (1.0, 2.0) for _run in range(4)]
    assert list(found.seconds.values()) == pytest.approx(expected)
    (line,) = found.summary()
    assert line.startswith("8 runs to do: about 1m 00s, 2 at a time")  # 120 s by 2
    assert "7 s for each start" in line
    again = cost_of(grid, 2)
    assert again.times == found.times
    assert len(planner.asked) == 1
    assert found.describe().count("(x 2 seeds)") == 1


def test_the_steps_of_a_ramp_up_count_by_their_sequences(tmp_path: Path) -> None:
    """Of 4, 4, 4 and 8 sequences: 20 of the 64; and the validation of the test above."""
    ramp = "schedule.rampup_batch_size={start: 4, increment: 4, samples: 32}"
    (run,) = make_grid(study(Point("a", {}, {})), write(tmp_path), [ramp], tmp_path, 1).runs
    assert Times(0.0, 1.0).seconds(run) == pytest.approx(20 / 16 + 4 / 3)


def test_a_prediction_is_in_gpu_hours(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(monkeypatch, {"step_seconds": 3600.0}, {"step_seconds": 3600.0})
    found = cost_of(grid, 2, "h200")
    assert planner.asked[0]["gpu"] == "h200"
    assert found.summary() == ["8 runs to do: 42.7 GPU-hours on h200, predicted"]
    assert not grid.out.exists()


def test_a_cost_that_cannot_be_measured_says_why(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    Planner(monkeypatch, {"step_seconds": 1.0}, {"problem": "parallel.tensor = 2 must be 1"})
    found = cost_of(grid, 1, say=lambda _text: None)
    assert len(found.times) == 4
    assert found.summary() == [
        "8 runs to do, at a cost that is not known: parallel.tensor = 2 must be 1"
    ]


def test_a_run_lasts_its_start_steps_and_validations(grid: Grid, tmp_path: Path) -> None:
    settings = ["training.validate_every=2", "training.validation_sequences=16"]
    (run,) = make_grid(study(Point("a", {}, {})), grid.runs[0].path, settings, tmp_path).runs
    assert Times(5.0, 3.0).seconds(run) == pytest.approx(5 + 3 * (4 + 3 / 3))
