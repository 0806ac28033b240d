"""Standard output and error whose failures do not end a command."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keel_megatron.config.terminal import printable, width
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import NO_ROOM
from keel_megatron.runtime.tables import fitted


def tolerate_consoles() -> None:
    """Make this process's output tolerate any console.

    Characters that the encoding lacks, and control characters, are escaped (backslashreplace). When
    the reader of a pipe has exited (`keel train ... | head`), further output is discarded; the
    command and its exit code do not change. A stream that is closed (`>&-`) is /dev/null.
    """
    if sys.stdin is None:
        sys.stdin = _nowhere("rb")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or _nowhere("wb")
        if type(stream) is io.TextIOWrapper:  # not a replacement by a test or a notebook
            setattr(sys, name, _Tolerant(stream))
    if isinstance(sys.stderr, _Tolerant):  # there is nowhere to report it
        sys.stderr.outlives_full_disk = True


def _nowhere(mode: str) -> io.TextIOWrapper:
    """/dev/null as a standard stream; at its number, which a data file would get otherwise."""
    opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    os.set_inheritable(opened, True)
    return io.TextIOWrapper(open(opened, mode, closefd=False), encoding="utf-8")


def outlive_full_disk() -> None:
    """Ignore a full disk under this process's redirected output.

    For commands whose output is saved elsewhere too.
    """
    if isinstance(sys.stdout, _Tolerant):
        sys.stdout.outlives_full_disk = True


@contextmanager
def report_output_errors() -> Iterator[None]:
    """Context in which standard output that cannot be written is a `UserError`.

    It is flushed at the end; the interpreter would do that with a traceback.

    Raises:
        UserError: it cannot be written, for example on a full disk.
    """
    stream = sys.stdout
    try:
        try:
            yield
        finally:
            stream.flush()
    except OSError as error:
        if not isinstance(stream, _Tolerant) or error is not stream.failure:
            raise
        stream.discard()
        raise UserError(f"standard output cannot be written: {error.strerror}") from error


def print_report(text: str) -> None:
    """Print sentences and tables; on a terminal, so that they fit its width."""
    if sys.stdout.isatty():
        text = fitted(text, width(sys.stdout))
    print(text, flush=True)


def print_path(path: Path) -> None:
    """Print a path for scripts: byte for byte, even if the console cannot show it."""
    if isinstance(sys.stdout, _Tolerant):
        sys.stdout.flush()
        sys.stdout.write_bytes(os.fsencode(path) + b"\n")
    else:
        print(path)


class _Trusted:
    """The same stream without escaping, for the program's own control sequences."""

    def __init__(self, stream: _Tolerant) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text unescaped."""
        return self._stream.write_unchanged(text)


class _Tolerant(io.TextIOWrapper):
    """A standard stream in place of the interpreter's own.

    Attributes:
        trusted: see `config.terminal.trusted`.
        outlives_full_disk: discard text without an error while the disk is full.
        failure: the last error that was raised.
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
        self.failure: OSError | None = None

    def write(self, text: str, /) -> int:
        """Write text, escaped by `printable`."""
        self.write_unchanged(printable(text))
        return len(text)

    def write_unchanged(self, text: str) -> int:
        """Write text, or discard it if the reader has exited."""
        try:
            return super().write(text)
        except BrokenPipeError:
            self.discard()
        except OSError as error:
            self._pardon(error)
        return len(text)

    def write_bytes(self, content: bytes) -> None:
        """Write bytes unchanged."""
        try:
            self.buffer.write(content)
            self.buffer.flush()
        except BrokenPipeError:
            self.discard()
        except OSError as error:
            self._pardon(error)

    def flush(self) -> None:
        """Flush the buffer, or discard it if the reader has exited."""
        try:
            super().flush()
        except BrokenPipeError:
            self.discard()
        except OSError as error:
            self._pardon(error)

    def _pardon(self, error: OSError) -> None:
        if not (self.outlives_full_disk and error.errno in NO_ROOM):
            self.failure = error
            raise error

    def discard(self) -> None:
        """Redirect the stream and its buffer to /dev/null."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
