"""A study that is stopped at an awkward moment."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.studies import runner
from keel_megatron.tracking.screen import Screen
from tests.studies.test_grid import grid, rates, write


class Process:
    """A run whose start is interrupted by a signal to the study; it would end by itself, later."""

    signals: list[int]

    def __init__(self, *_command: Any, **_options: Any) -> None:
        Process.signals = []
        self._polls = 0
        signal.raise_signal(signal.SIGTERM)

    def poll(self) -> int | None:
        self._polls += 1
        return 0 if self.signals or self._polls > 9 else None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


def test_a_run_that_is_starting_is_asked_to_save_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: a second signal would end it at once."""
    found = grid(write(tmp_path), rates(1e-3, 1e-2))
    monkeypatch.setattr(runner.subprocess, "Popen", Process)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.0)
    with closing(Screen(tmp_path / "study.log")) as screen:
        ended = runner.LocalRunner(found, 1, screen, lambda _run: {}).run()
    assert ended.signal == signal.SIGTERM
    assert Process.signals == [signal.SIGTERM]
