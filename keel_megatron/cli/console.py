"""Standard output and standard error that fail no command: a run outlives its terminal."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

from keel_megatron.config.terminal import printable
from keel_megatron.runtime.files import NO_ROOM


def tolerate_consoles() -> None:
    """Let this process's output be shown as far as the console can, whatever it is.

    A character that its encoding lacks is written as its code (backslashreplace), and so is one
    that a terminal would obey. When whoever reads a pipe has left (`keel train ... | head`), the
    rest is discarded: what the command does and its exit code are the same.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not one that a test or a notebook put there
            setattr(sys, name, _Tolerant(stream))


def outlive_full_disk() -> None:
    """Let a full disk under this process's redirected output neither end it nor change its code.

    What it shows is kept elsewhere, too.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Tolerant):
            stream.outlives_full_disk = True


def print_path(path: Path) -> None:
    """Print a path for scripts: byte for byte, even if the console cannot show it."""
    if isinstance(sys.stdout, _Tolerant):
        sys.stdout.flush()
        sys.stdout.write_bytes(os.fsencode(path) + b"\n")
    else:
        print(path)


class _Trusted:
    """The same stream for our own display, whose control sequences are meant."""

    def __init__(self, stream: _Tolerant) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text as it is."""
        return self._stream.write_unchanged(text)


class _Tolerant(io.TextIOWrapper):
    """A standard stream in place of the interpreter's own.

    Attributes:
        trusted: see `config.terminal.trusted`.
        outlives_full_disk: whether text is lost, with no error, while a disk is full.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        encoding, line_buffering = stream.encoding, stream.line_buffering
        write_through = stream.write_through
        super().__init__(
            stream.detach(),
            encoding=encoding,
            errors="backslashreplace",
            line_buffering=line_buffering,
            write_through=write_through,
        )
        self.trusted = _Trusted(self)
        self.outlives_full_disk = False

    def write(self, text: str, /) -> int:
        """Write text as `printable` has it."""
        self.write_unchanged(printable(text))
        return len(text)

    def write_unchanged(self, text: str) -> int:
        """Write text, or discard it if nobody reads any more."""
        try:
            return super().write(text)
        except BrokenPipeError:
            self._discard()
        except OSError as error:
            self._pardon(error)
        return len(text)

    def write_bytes(self, content: bytes) -> None:
        """Write bytes as they are."""
        try:
            self.buffer.write(content)
            self.buffer.flush()
        except BrokenPipeError:
            self._discard()

    def flush(self) -> None:
        """Hand on what is buffered, or discard it."""
        try:
            super().flush()
        except BrokenPipeError:
            self._discard()
        except OSError as error:
            self._pardon(error)

    def _pardon(self, error: OSError) -> None:
        if not (self.outlives_full_disk and error.errno in NO_ROOM):
            raise error

    def _discard(self) -> None:
        """Lead the stream, and what is still in its buffer, to nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
