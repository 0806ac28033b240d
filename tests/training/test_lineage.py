"""What a start says about where it comes from, and what checkpoints keep of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint.json_codec import from_json, to_json
from keel_megatron.checkpoint.resume import ResumePoint
from keel_megatron.config import RunConfig, dump_config
from keel_megatron.mlflow_delivery.target import remembered_run_id
from keel_megatron.training.lineage import Lineage, accept, learning_rate_lines
from tests.settings import small_config


def settings(home: Path, name: str = "test", **values: Any) -> RunConfig:
    wanted: dict[str, Any] = {
        "training__runs_dir": str(home),
        "training__name": name,
        "training__steps": 200,
        "schedule__warmup_steps": 0,
        "optimizer__learning_rate": 5e-3,
        "schedule__min_learning_rate": 1e-5,
    }
    config = small_config(**(wanted | values))
    config.training.folder.mkdir(parents=True, exist_ok=True)
    return config


def checkpoint(config: RunConfig, step: int, lineage: Lineage | None, **extras: Any) -> ResumePoint:
    """What a start finds after an earlier one has saved."""
    path = config.training.folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(dump_config(config))
    parts = {} if lineage is None else lineage.stateful(config.training.folder)
    kept = {name: to_json(part.state()) for name, part in parts.items()}
    return ResumePoint(path, {"extras": kept | extras})


def texts(lineage: Lineage) -> list[str]:
    return [f"{change.step}: {change}" for change in lineage.changes]


def test_changes_are_kept_as_a_history_and_taken_back(tmp_path: Path) -> None:
    first, second = settings(tmp_path), settings(tmp_path, optimizer__learning_rate=1e-3)
    start = accept(first, ResumePoint())
    assert (start.changes, start.lines, start.resumes) == ([], [], False)
    found = checkpoint(first, 6, start)
    lower = accept(second, found)
    assert lower.lines[0] == (
        "since the checkpoint of step 6: optimizer.learning_rate 0.005 -> 0.001"
    )
    back = accept(first, checkpoint(second, 8, lower))
    assert texts(back) == [
        "6: optimizer.learning_rate 0.005 -> 0.001",
        "8: optimizer.learning_rate 0.001 -> 0.005",
    ]
    kept = from_json(checkpoint(first, 12, back).state["extras"])["changes"]
    assert [change["step"] for change in kept] == [6, 8]
    same = accept(first, checkpoint(first, 12, back))
    assert texts(same) == texts(back)
    assert same.lines[0] == "the settings are those of the checkpoint of step 12"
    assert accept(first, found).changes == [], "a start that came to no checkpoint is void"


def test_a_start_says_what_the_rate_was_and_becomes(tmp_path: Path) -> None:
    old = settings(tmp_path)
    (line,) = learning_rate_lines(old, old, 100)
    assert line == "learning rate: 0.002505 at step 100, 0.002466 at step 101"
    (line,) = learning_rate_lines(old, settings(tmp_path, optimizer__learning_rate=4e-3), 100)
    assert line == "learning rate: 0.002505 at step 100, 0.001974 at step 101"
    assert learning_rate_lines(old, old, 200) == []
    (line,) = learning_rate_lines(old, old, 0)
    assert line == "learning rate: no step yet, 0.005 at step 1"


@pytest.mark.parametrize(
    ("values", "now"),
    [
        ({"training__steps": 2000}, "0.004877;"),  # the curve is stretched
        ({"training__steps": 201, "schedule__decay": "constant"}, "0.005"),
        ({"training__steps": 201, "schedule__min_learning_rate": 4e-6}, "4e-06"),  # downwards
    ],
)
def test_a_jump_of_the_rate_is_a_warning(tmp_path: Path, values: dict[str, Any], now: str) -> None:
    old, new = settings(tmp_path), settings(tmp_path, **values)
    _rate, warning = learning_rate_lines(old, new, 200)
    assert warning.startswith("warning: the learning rate jumps: step 201 uses " + now)
    assert "settings would use 1e-05" in warning
    assert "schedule.*" in warning
    advice = settings(
        tmp_path, training__steps=2000, optimizer__learning_rate=1e-5, schedule__decay="constant"
    )
    assert "optimizer.learning_rate=1e-05 schedule.decay=constant" in warning
    assert len(learning_rate_lines(old, advice, 200)) == 1, "what it says helps"


def test_a_rate_of_nothing_is_no_advice(tmp_path: Path) -> None:
    """At the end of a curve down to 0; optimizer.learning_rate=0 would be refused."""
    old = settings(tmp_path, schedule__min_learning_rate=0.0)
    new = settings(tmp_path, schedule__min_learning_rate=0.0, training__steps=2000)
    _rate, warning = learning_rate_lines(old, new, 200)
    assert "settings would use 0." in warning
    assert "learning_rate=" not in warning


def test_the_mlflow_run_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    config = settings(tmp_path)
    accept(config, checkpoint(config, 2, None, mlflow_run_id="feed"))
    assert remembered_run_id(config.training.folder) == "feed"
    accept(config, checkpoint(config, 4, None, mlflow_run_id="other"))
    assert remembered_run_id(config.training.folder) == "feed"


@pytest.mark.parametrize("earlier", [False, True])
def test_a_copy_takes_no_mlflow_run_from_its_checkpoints(tmp_path: Path, earlier: bool) -> None:
    """They are the original's, at the second start too, and if they name no run."""
    config, copy = settings(tmp_path), settings(tmp_path, "copy")
    start = accept(config, ResumePoint())
    (config.training.folder / "mlflow_run_id").write_text("feed")
    (copy.training.folder / "run.json").write_bytes(
        (config.training.folder / "run.json").read_bytes()
    )
    found = checkpoint(copy, 4, None if earlier else start, mlflow_run_id="feed")
    for _start in range(2):
        own = accept(copy, found)
        assert remembered_run_id(copy.training.folder) is None
        assert own.run.origin is not None
        assert (own.run.origin.step, own.run.origin.mlflow_run_id) == (4, "feed")
        assert own.run.id != start.run.id
    found = checkpoint(copy, 6, own, mlflow_run_id="beef")
    accept(copy, found)
    assert remembered_run_id(copy.training.folder) == "beef", "its own"


class Tags:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def tags(self, tags: dict[str, str]) -> None:
        self.seen |= tags

    def changes(self, _changes: Any) -> None:
        pass


def test_what_a_run_started_from_stays_when_the_setting_changes(tmp_path: Path) -> None:
    """In the tags of every start and in every checkpoint."""
    origin = {"path": "/runs/first", "run_id": None, "step": 30}
    first = accept(settings(tmp_path), ResumePoint(), origin)
    config = settings(tmp_path, training__initialize_from="another")
    again = accept(config, checkpoint(settings(tmp_path), 4, first))
    for lineage in (first, again):
        tracker: Any = Tags()
        lineage.report(tracker)
        assert tracker.seen == {
            "initialized_from.path": "/runs/first",
            "initialized_from.step": "30",
        }
        stateful = lineage.stateful(tmp_path)
        assert stateful["initialized_from"].state() == origin
    assert any("has no effect" in line for line in again.lines)
    assert not any("has no effect" in line for line in first.lines)
