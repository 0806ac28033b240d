"""Draws the pictures of a run's depth profiles, during training and at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from keel_megatron.depth.profile import read_profiles
from keel_megatron.tracking.run_log import METRICS_FILE

_SHARE = 0.01
_FIRST_GUESS = 3.0
"""Assumed duration of a drawing before the first one is measured, in seconds."""


class DepthDrawer:
    """Draws a run's depth profiles from its log, in a process that does not train.

    A drawing occupies a core for a second or more. While the run trains, a new picture is drawn
    only if the last drawing took less than 1 % of the time since then.

    Args:
        folder: the run's folder.
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._seconds = _FIRST_GUESS
        self._drawn_at = clock()
        self._drawn_size = 0

    @property
    def is_due(self) -> bool:
        """Whether a new picture should be drawn now."""
        affordable = self._seconds <= _SHARE * (self._clock() - self._drawn_at)
        return affordable and self._size() != self._drawn_size

    def draw(self) -> list[Path]:
        """Draw the pictures, if the run has profiles and the log has grown since the last time.

        Raises:
            UserError: a line of the log is not a record.
            OSError: a picture cannot be written.
        """
        started, size = self._clock(), self._size()
        if size == self._drawn_size:
            return []
        try:
            return draw_profiles(self._folder)
        finally:
            self._drawn_at, self._drawn_size = self._clock(), size
            self._seconds = self._drawn_at - started

    def _size(self) -> int:
        with suppress(OSError):
            return (self._folder / METRICS_FILE).stat().st_size
        return 0


def draw_profiles(folder: Path) -> list[Path]:
    """Draw a run's depth profiles into its folder; the pictures, none if it has no profiles.

    Raises:
        UserError: a line of the log is not a record.
        OSError: a picture cannot be written.
    """
    profiles = read_profiles(folder, may_lack=True)
    if not profiles:
        return []
    # Imported late: matplotlib takes a second.
    from keel_megatron.depth.pictures import plot_all

    return plot_all(profiles, folder.resolve().name, folder)
