"""The depth profiles of a running run: their file, and when their pictures are drawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from keel_megatron.depth.profile import DEPTH_FILE, DepthProfile, read_profiles
from keel_megatron.tracking.metrics import MetricsFile

_SHARE = 0.002
_FIRST_GUESS = 3.0
"""Seconds that a drawing takes, before the first one has told."""


class DepthLog:
    """depth.jsonl of a run's folder, written and rewound like metrics.jsonl.

    Args:
        folder: the run's folder.
        resume_step: later profiles are dropped; None drops all.
        clock: seconds that only go forward.
        say: told when it cannot be written, and when it can be again.

    Raises:
        UserError: a line in the middle of the file is no profile, or it cannot be changed.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int | None,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._say = say
        self._file: MetricsFile | None = None
        self._undrawn = False
        self._seconds = _FIRST_GUESS
        self._drawn_at = clock()
        path = folder / DEPTH_FILE
        if path.is_file():
            self._open(path, resume_step)

    def write(self, profile: DepthProfile) -> None:
        """Append a profile."""
        if self._file is None:
            self._file = MetricsFile(self._folder / DEPTH_FILE, self._say)
        self._file.write(profile)
        self._undrawn = True

    def rewind(self, step: int) -> None:
        """Drop the profiles after `step`."""
        if self._file is not None:
            self._file.rewind(step)

    def draw(self, *, ending: bool) -> list[Path]:
        """Draw the pictures, if there is something new and it is time to.

        Drawing takes a second or more of rank 0, for which the others wait. So while the run goes
        on there is a picture only if drawing the last one took less than 0.2 % of the time since;
        at its end there is always one.

        Returns:
            The pictures, or nothing.
        """
        started = self._clock()
        affordable = self._seconds <= _SHARE * (started - self._drawn_at)
        if not self._undrawn or not (ending or affordable):
            return []
        # Imported late: matplotlib takes a second.
        from keel_megatron.depth.pictures import plot_all

        pictures = plot_all(read_profiles(self._folder), self._folder.resolve().name, self._folder)
        self._undrawn = False
        self._drawn_at = self._clock()
        self._seconds = self._drawn_at - started
        return pictures

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> DepthLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, path: Path, resume_step: int | None) -> None:
        self._file = MetricsFile(path, self._say)
        if resume_step is None:
            self._file.clear()
        else:
            self._file.rewind(resume_step)
