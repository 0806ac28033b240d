"""Messages and live lines of a long command, on the console and in a log file."""

from __future__ import annotations

import datetime
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live

from keel_megatron.config.terminal import has_colours, is_live, printable, trusted
from keel_megatron.runtime.files import NO_ROOM, LineFile
from keel_megatron.urls import without_credentials

_SECONDS_PER_REFRESH = 0.1


class Screen:
    """A console, and a log with times in UTC.

    On a terminal, live lines stay at the bottom and messages appear above them. A closed pipe or
    terminal is no error: the log continues. Thread-safe.

    Args:
        log: log file; None: set later by `keep`.
        stream: output stream; None: standard output.
    """

    def __init__(self, log: Path | None, stream: TextIO | None = None) -> None:
        self._stream: TextIO | None = stream or sys.stdout  # None: closed (`>&-`)
        self._lock = threading.RLock()
        self._log: LineFile | None = None
        self._unkept: list[str] = []
        if log is not None:
            self.keep(log)
        # rich's own detection would treat a file as a terminal if FORCE_COLOR is set.
        terminal = self._stream is not None and self._stream.isatty()
        coloured = terminal and has_colours(self._stream)
        self._console = Console(
            file=trusted(self._stream),
            force_terminal=terminal,
            color_system="auto" if coloured else None,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )
        self.is_live = is_live(self._stream)
        """Whether `draw` shows anything."""
        self._live: Live | None = None
        self._drawn_at = 0.0

    def keep(self, log: Path) -> None:
        """Write everything to a file from now on, earlier messages first."""
        with self._lock:
            self._log = LineFile(log, self._show)
            for line in self._unkept:
                self._log.append(line)
            self._unkept.clear()

    def say(self, text: str) -> None:
        """Show a message, above the live lines if there are any, and write it to the log.

        Parts of URLs that may be secret are hidden.
        """
        text = without_credentials(text)
        with self._lock:
            self._show(text)
            self.note(text)

    def note(self, text: str) -> None:
        """Write a message to the log only."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        lines = [f"{now} {line}" for line in without_credentials(text).splitlines() or [""]]
        with self._lock:
            if self._log is None:
                self._unkept += lines
            else:
                for line in lines:
                    self._log.append(line)

    def draw(self, picture: Callable[[], RenderableType]) -> None:
        """Show the live lines, at most ten times a second; nothing without a terminal.

        Args:
            picture: makes them; called only if they are shown.
        """
        with self._lock:
            now = time.monotonic()
            if not self.is_live:
                return
            if self._live is not None and now - self._drawn_at < _SECONDS_PER_REFRESH:
                return
            self._drawn_at = now
            try:
                shown = picture()
                if self._live is None:
                    # No refresh thread: the display changes only here.
                    self._live = Live(shown, console=self._console, auto_refresh=False)
                    self._live.start()
                self._live.update(shown, refresh=True)
            except OSError:
                self._go_silent()

    def stop(self, picture: RenderableType | None = None) -> None:
        """End the live lines; later messages are text lines.

        Args:
            picture: the live lines to leave there; None: those that were drawn last.
        """
        with self._lock:
            live, self._live, self.is_live = self._live, None, False
            if live is not None:
                if picture is not None:
                    live.update(picture)
                with suppress(OSError):
                    live.stop()

    def close(self) -> None:
        """End the live lines and close the log; later messages are only shown."""
        with self._lock:
            try:
                self.stop()
            finally:
                if self._log is not None:
                    self._log.close()
                    self._log = None

    def _show(self, text: str) -> None:
        if self._stream is None:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = printable(text).encode(encoding, "replace").decode(encoding)
        try:
            if self._live is not None:
                self._console.print(text)
            else:
                # Not through rich, which exits the program when a pipe is closed.
                self._stream.write(text + "\n")
                self._stream.flush()
        except OSError as error:
            if error.errno not in NO_ROOM:
                self._go_silent()

    def _go_silent(self) -> None:
        """Stop printing to a closed pipe or terminal; the log continues."""
        self._stream = self._live = None
        self.is_live = False
