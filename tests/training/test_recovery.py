"""What becomes of an anomalous step: tolerated, skipped, or rolled back; without ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint import state as checkpoint_state
from keel_megatron.checkpoint.resume import ResumePoint
from keel_megatron.checkpoint.state import Loaded, Position
from keel_megatron.engines.base import StepResult
from keel_megatron.errors import UserError
from keel_megatron.training import diagnose, recovery
from keel_megatron.training.guard import Guard
from keel_megatron.training.recovery import Inspection, roll_back, what_is_left
from keel_megatron.training.run_state import RunState
from tests.settings import small_config
from tests.training.fakes import FakeEngine, FakeSaver, FakeTracker


@pytest.fixture(autouse=True)
def _no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "describe", lambda *_arguments: "block 3")


def inspected(action: str, loss: float) -> tuple[bool, Inspection, FakeTracker]:
    """A step of this loss after quiet ones."""
    config = small_config(guard__action=action, guard__window=8, guard__min_steps=8)
    guard, tracker = Guard(config.guard), FakeTracker()
    for _ in range(8):
        guard.accept(1.0, 0.5)
    inspection = Inspection(guard, FakeEngine(config), tracker, [], 9)  # type: ignore[arg-type]
    return inspection(StepResult(loss, 0.5)), inspection, tracker


@pytest.mark.parametrize(
    ("action", "loss", "updates", "said"),
    [
        ("warn", 1.0, True, None),
        ("off", 99.0, True, None),
        ("warn", 99.0, True, "block 3"),
        ("skip", 99.0, False, "its update is skipped; block 3"),
        ("rollback", 99.0, False, "block 3"),
        ("off", math.nan, False, "guard, step 9 (off): loss is nan, its update is skipped"),
        ("warn", math.nan, False, "its update is skipped; block 3"),
    ],
)
def test_the_update_and_what_is_said_of_it(
    action: str, loss: float, updates: bool, said: str | None
) -> None:
    made, inspection, tracker = inspected(action, loss)
    assert made is updates
    assert (inspection.anomaly is None) == (said is None)
    assert len(tracker.said) == (said is not None)
    for text in tracker.said:
        assert str(said) in text
        assert ("its update is skipped" in text) == (not updates and action != "rollback")


def test_a_rollback_goes_to_a_checkpoint_of_the_interval_and_past_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def newest_good(_folder: Path, _runtime: Any, multiple_of: int = 1) -> ResumePoint:
        asked.append(multiple_of)
        if multiple_of != 1:
            return ResumePoint()
        path = Path("checkpoints/step_00000003")
        return ResumePoint(path, {}, ("step 4 is damaged",), frozenset({4}))

    loaded = Loaded(Position(3, 24), {})
    monkeypatch.setattr(recovery, "newest_good", newest_good)
    monkeypatch.setattr(checkpoint_state, "load", lambda *_arguments: loaded)
    config = small_config(guard__action="rollback", checkpoint__every=5)
    engine: Any = FakeEngine(config)
    guard, saver, tracker = Guard(config.guard), FakeSaver(), FakeTracker()
    state = RunState(engine, saver, {"guard": guard})  # type: ignore[arg-type]
    state.position = Position(6, 48)
    roll_back(engine, state, guard, tracker)  # type: ignore[arg-type]
    assert asked == [5, 1], "one that a signal made is the second choice"
    assert state.position == Position(3, 48)
    assert (saver.aside, tracker.rewound) == ({4}, [3])
    assert tracker.said == [
        "step 4 is damaged",
        "guard: back at step 3; the data continues after sequence 48",
    ]


def test_a_rollback_without_a_checkpoint_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "newest_good", lambda *_arguments, **_more: ResumePoint())
    config = small_config(guard__action="rollback")
    engine: Any = FakeEngine(config)
    guard = Guard(config.guard)
    state = RunState(engine, FakeSaver(), {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"guard.action: rollback finds no checkpoint in"):
        roll_back(engine, state, guard, FakeTracker())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "anomaly", "says"),
    [
        ([], 5, "newest checkpoint: none"),
        ([2, 4], None, "newest checkpoint: {root}/step_00000004"),
        ([2, 4], 5, "newest checkpoint: {root}/step_00000004"),
        ([2, 6], 5, "the newest from before the first anomaly, step 5: {root}/step_00000002"),
    ],
)
def test_a_diverged_run_names_what_there_is_to_resume_from(
    steps: list[int], anomaly: int | None, says: str, tmp_path: Path
) -> None:
    for step in steps:
        folder.step_folder(tmp_path, step).mkdir(parents=True)
    text = what_is_left(tmp_path, anomaly)
    assert says.format(root=folder.root(tmp_path)) in text
    assert ("before the first anomaly" in text) == ("before" in says)
