"""Progress of the runs at work: live lines on a terminal, and a line now and then in the log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from rich.console import Group
from rich.text import Text

from keel_megatron.config.reading import lines_of, open_regular, parse_json
from keel_megatron.tracking.outbox import milliseconds
from keel_megatron.tracking.progress import duration
from keel_megatron.tracking.screen import Screen

SECONDS_BETWEEN_DRAWINGS: Final = 1.0
SECONDS_BETWEEN_LINES: Final = 300.0


class RunStatus:
    """Progress of one start of a run, from its metrics.jsonl.

    Args:
        name: the run.
        metrics: its metrics.jsonl, which need not exist yet.
        steps: steps of the whole run.
        since: time of the start, milliseconds since 1970: earlier records are another start's.
    """

    def __init__(self, name: str, metrics: Path, steps: int, since: int | None = None) -> None:
        self._name = name
        self._metrics = metrics
        self._steps = steps
        self._since = milliseconds() if since is None else since
        self._offset = 0
        self._first: dict[str, Any] | None = None
        self._last: dict[str, Any] | None = None

    def line(self) -> str:
        """Step, loss and time left, read from the file now."""
        with suppress(OSError, ValueError):
            self._read()
        if self._first is None or self._last is None:
            return f"{self._name}: starting"
        step, loss = self._last["step"], self._last["loss"]
        left = duration(self._seconds_a_step() * max(0, self._steps - step))
        return f"{self._name}: step {step}/{self._steps}, loss {loss:.4f}, {left} left"

    def _seconds_a_step(self) -> float:
        """Wall-clock mean, validations and saves included, without the first step."""
        assert self._first is not None
        assert self._last is not None
        steps = self._last["step"] - self._first["step"]
        if steps <= 0:  # a rollback, or the first step
            return float(self._last["seconds"])
        return (self._last["time"] - self._first["time"]) / 1000 / steps

    def _read(self) -> None:
        """Take in what was appended; from the beginning if the file was truncated.

        Raises:
            OSError: there is no file yet, or it cannot be read.
            ValueError: a line is too long.
        """
        with open_regular(self._metrics) as stream:
            if stream.seek(0, 2) < self._offset:
                self._offset = 0
            stream.seek(self._offset)
            for line in lines_of(stream):
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        """Take in a line; anything but a step of this start is ignored."""
        with suppress(ValueError):
            found = parse_json(line)
            numbers = ("step", "loss", "seconds", "time")
            if not isinstance(found, dict) or not all(_is_number(found.get(n)) for n in numbers):
                return
            if found["time"] >= self._since:
                self._first = self._first or found
                self._last = found


class Status:
    """Shows the runs at work.

    On a terminal, one line for each is drawn again every second. The log, and a console that is no
    terminal, get a line for each every five minutes after its start.

    Args:
        screen: console and log.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, screen: Screen, clock: Callable[[], float] = time.monotonic) -> None:
        self._screen = screen
        self._clock = clock
        self._drawn_at = -math.inf
        self._told_at: dict[RunStatus, float] = {}

    def show(self, runs: Sequence[RunStatus]) -> None:
        """Show runs; called often."""
        now = self._clock()
        if self._screen.is_live and now - self._drawn_at >= SECONDS_BETWEEN_DRAWINGS:
            self._drawn_at = now
            lines = [run.line() for run in runs]
            self._screen.draw(
                lambda: Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
            )
        tell = self._screen.note if self._screen.is_live else self._screen.say
        told = {run: self._told_at.get(run, now) for run in runs}
        for run in runs:
            if now - told[run] >= SECONDS_BETWEEN_LINES:
                told[run] = now
                tell(run.line())
        self._told_at = told

    def end(self) -> None:
        """Take the live lines away: no run is at work any more."""
        self._screen.stop(Group())


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
