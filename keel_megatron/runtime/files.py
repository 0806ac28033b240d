"""Files safe against a full disk and partial writes: those of a run, and those that a user names.

Writes into a run's folder (`write_whole`, `LineFile`) do not follow a link at the file's name,
because the folder may come from someone else. A path that the user gave as an output is followed
and never replaced by another kind of file (`write_output`): it may be a link, a pipe or a device.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate, islice, takewhile
from pathlib import Path

from keel_megatron.config.reading import read_small
from keel_megatron.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KEPT_BYTES = 16_000_000
"""Maximum bytes of a file kept in memory while it cannot be written."""
_BLOCK = 1 << 20
_APPEND = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_REPLACE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically: readers see the old or the new content, even after a kill.

    A file that already has this content is not written, which needs no space.

    Raises:
        OSError: the file cannot be written; it is unchanged.
    """
    content = content.encode() if isinstance(content, str) else content
    with suppress(OSError):
        if not path.is_symlink() and read_small(path, len(content)) == content:
            return
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, _REPLACE, 0o666), "wb") as stream:
            stream.write(content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def check_output(option: str, path: Path) -> None:
    """Check that an output file can be written, before the work that its content needs.

    Args:
        option: the option that gives the path, for the error.
        path: the file; a link is followed.

    Raises:
        UserError: it cannot be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not _is_special(path):
            with tempfile.TemporaryFile(dir=_target(path).parent):
                pass
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(option, path, error) from error


def write_output(option: str, path: Path, content: str | bytes) -> None:
    """Write an output file: a regular file atomically, a pipe or a device in place.

    A link stays; the file that it names is written.

    Args:
        option: the option that gives the path, for the error.
        path: the file.
        content: text is encoded as UTF-8.

    Raises:
        UserError: it cannot be written; a regular file is unchanged.
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        if _is_special(path):
            path.write_bytes(content)
        else:
            write_whole(_target(path), content)
    except OSError as error:
        raise _unwritable(option, path, error) from error


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which must not be replaced."""
    return path.exists() and not path.is_file()


def _target(path: Path) -> Path:
    """The file that is written: not a link to it, which would be replaced."""
    return Path(os.path.realpath(path))


def _unwritable(option: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{option}: {path} cannot be written: {error.strerror or error}")


class LineFile:
    """Appends lines to a text file, unbuffered.

    While the disk is full or does not respond, lines are kept in memory up to `limit` bytes, and
    written later; further lines are dropped. The file never contains a partial line. Not
    thread-safe.

    Args:
        path: the file, created with its folder at the first line.
        say: called with a message when writing fails, and when it works again.
        limit: maximum bytes kept in memory.

    Attributes:
        kept: the lines that are only in memory.
        kept_bytes: their size.
        written: bytes written to the file.
        left_out: number of dropped lines.
    """

    def __init__(
        self,
        path: Path,
        say: Callable[[str], None] = lambda _text: None,
        limit: int = KEPT_BYTES,
    ) -> None:
        self.path = path
        self.kept: deque[bytes] = deque()
        self.kept_bytes = 0
        self.written = 0
        self.left_out = 0
        self._say = say
        self._limit = limit
        self._descriptor: int | None = None
        self._problem: str | None = None

    def append(self, line: str | bytes, *, must: bool = False) -> None:
        """Append a line, without its end.

        Args:
            line: the line.
            must: keep the line in memory even above the limit.
        """
        line = (line.encode("utf-8", "replace") if isinstance(line, str) else line) + b"\n"
        if not must and self.kept_bytes + len(line) > self._limit and self.kept:
            self.left_out += 1
        else:
            self.kept.append(line)
            self.kept_bytes += len(line)
        self.write()

    def write(self) -> bool:
        """Try to write the kept lines; returns whether all are written."""
        if not self.kept:
            return True
        try:
            self._write()
        except OSError as error:
            self._close()
            if self._problem is None:
                self._problem = error.strerror or str(error)
                self._say(
                    f"cannot write {self.path}: {self._problem}; its lines are kept in memory "
                    "until there is room again"
                )
            return False
        if self._problem is not None:
            self._problem = None
            lack = f"; {self.left_out:,} lines were dropped" if self.left_out else ""
            self._say(f"{self.path} is written again{lack}")
        return True

    def cut(self, size: int, kept: list[bytes]) -> None:
        """Create or truncate the file, and replace the lines kept in memory; needs no disk space.

        Args:
            size: bytes to keep in the file.
            kept: the following lines, with line ends.

        Raises:
            OSError: the file cannot be changed.
        """
        os.ftruncate(self._open(), size)
        self.kept = deque(kept)
        self.kept_bytes = sum(map(len, kept))
        self.write()

    def close(self) -> None:
        """Try to write once more, report missing lines, and close the file."""
        self.write()
        self._close()
        missing = len(self.kept) + self.left_out
        if missing:
            self._say(f"{self.path} lacks {missing:,} lines, for which there was no room")

    def _open(self) -> int:
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, _APPEND, 0o666)
            whole = whole_lines(self._descriptor)
            if whole < os.fstat(self._descriptor).st_size:  # a kill left a partial last line
                os.ftruncate(self._descriptor, whole)
        return self._descriptor

    def _write(self) -> None:
        while self.kept:
            self._write_block(self._open())

    def _write_block(self, descriptor: int) -> None:
        """Write the first block of kept lines."""
        sizes = accumulate(map(len, self.kept))
        count = max(1, sum(1 for _ in takewhile(lambda size: size <= _BLOCK, sizes)))
        content = memoryview(b"".join(islice(self.kept, count)))
        before, written = os.fstat(descriptor).st_size, 0
        try:
            while written < len(content):
                written += os.write(descriptor, content[written:])
        finally:
            whole = 0
            while self.kept and whole + len(self.kept[0]) <= written:
                whole += len(self.kept.popleft())
            self.kept_bytes -= whole
            self.written += whole
            if whole < written:  # remove the partial line
                with suppress(OSError):
                    os.ftruncate(descriptor, before + whole)

    def _close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def whole_lines(descriptor: int) -> int:
    """Bytes of an open file up to the end of its last complete line."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
