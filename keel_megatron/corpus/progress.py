"""Progress of a build: one live line on a terminal, a line every few seconds elsewhere; a log."""

from __future__ import annotations

import datetime
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TextIO

from keel_megatron.config.terminal import is_live, printable, trusted, width
from keel_megatron.corpus.tokenize import Done
from keel_megatron.runtime.files import LineFile
from keel_megatron.tracking.progress import duration

SECONDS_BETWEEN_LINES: Final = 5.0
_SECONDS_BETWEEN_REFRESHES = 0.2


class BuildProgress:
    """Shows what was done and how long the rest takes. Thread-safe.

    Args:
        say: called with messages, and with progress lines where there is no terminal.
        log: file for both, with times in UTC.
        stream: output for the live line, if it is a terminal; None: standard output.
        clock: a monotonic clock, seconds.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        log: Path,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._log = LineFile(log)
        self._stream = stream or sys.stdout
        self._is_live = self._stream is not None and is_live(self._stream)
        self._clock = clock
        self._lock = threading.Lock()
        self._total = 0
        self._done = Done()
        self._started = self._shown = self._written = clock()
        self._width = 0

    def begin(self, size: int) -> None:
        """Begin to count: `size` bytes of source files are left."""
        with self._lock:
            self._total, self._done = size, Done()
            self._started = self._shown = self._written = self._clock()

    def say(self, text: str) -> None:
        """Show a message, and write it to the log."""
        with self._lock:
            self._clear()
            self._say(text)
            self._note(text)

    def add(self, done: Done) -> None:
        """Count work, and show the progress if it is time."""
        with self._lock:
            self._done.bytes += done.bytes
            self._done.documents += done.documents
            self._done.tokens += done.tokens
            now = self._clock()
            if self._is_live and now - self._shown > _SECONDS_BETWEEN_REFRESHES:
                self._shown = now
                self._show(self.line())
            if now - self._written > SECONDS_BETWEEN_LINES:
                self._written = now
                self._note(self.line())
                if not self._is_live:
                    self._say(self.line())

    def line(self) -> str:
        """Share, time left, documents, tokens, MB/s, tokens/s: a narrow terminal cuts the end."""
        done, seconds = self._done, max(self._clock() - self._started, 1e-6)
        share = min(max(done.bytes, 0) / self._total, 1.0) if self._total else 1.0
        left = duration(seconds * (1.0 - share) / share) if share > 0 else "?"
        return (
            f"{share:4.0%}, {left} left: {done.documents:,} documents, {done.tokens:,} tokens, "
            f"{max(done.bytes, 0) / seconds / 1e6:.1f} MB/s, {done.tokens / seconds:,.0f} tokens/s"
        )

    def close(self) -> None:
        """End the live line and the log."""
        with self._lock:
            self._clear()
            self._log.close()

    def _note(self, text: str) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for line in text.splitlines():
            self._log.append(f"{now} {line}")

    def _show(self, text: str) -> None:
        text = text[: width(self._stream) - 1]  # a wrapped line cannot be replaced
        with suppress(OSError):
            trusted(self._stream).write(f"\r{printable(text)}\x1b[K")
            self._stream.flush()
            self._width = len(text)

    def _clear(self) -> None:
        if self._width:
            self._show("")
            self._width = 0
