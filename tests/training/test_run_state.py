"""What is saved and restored, with the tensors left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint import state as checkpoint_state
from keel_megatron.checkpoint.state import Loaded, Position
from keel_megatron.training.run_state import RunState
from tests.settings import small_config
from tests.training.fakes import FakeEngine, FakeSaver


class Part:
    def __init__(self, value: int) -> None:
        self.value = value

    def state(self) -> int:
        return self.value

    def restore(self, state: int) -> None:
        self.value = state


def test_every_part_is_saved_by_its_name_and_once_a_position() -> None:
    saver = FakeSaver()
    state = RunState(FakeEngine(small_config()), saver, {"a": Part(1), "b": Part(2)})  # type: ignore[arg-type]
    state.position = Position(3, 24)
    state.save()
    state.save()
    assert saver.saved == [(Position(3, 24), {"a": 1, "b": 2})]
    state.position = Position(4, 32)
    state.save()
    assert len(saver.saved) == 2


def test_a_checkpoint_of_an_earlier_version_leaves_a_new_part_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(path: Path, *_arguments: Any) -> Loaded:
        assert path == Path("checkpoint")
        return Loaded(Position(3, 24), {"old": 7})

    monkeypatch.setattr(checkpoint_state, "load", load)
    saver, old, new = FakeSaver(), Part(1), Part(2)
    state = RunState(FakeEngine(small_config()), saver, {"old": old, "new": new})  # type: ignore[arg-type]
    state.restore(Path("checkpoint"))
    assert (state.position, old.value, new.value) == (Position(3, 24), 7, 2)
    state.save()
    assert saver.saved == [], "there is a checkpoint of this position"
