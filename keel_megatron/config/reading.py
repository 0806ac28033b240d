"""Reading of untrusted files, with size limits and without blocking."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

SMALL = 1 << 20
"""Maximum bytes of a configuration, a marker or a note."""
LARGE = 1 << 28
"""Maximum bytes of a list of all tensors or files."""
LONGEST_LINE = 1 << 24
"""Maximum bytes of a one-line record."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: the file cannot be opened or is not regular: opening a FIFO would block, and a
            device has no end.
    """
    _check_regular(path.stat(), path)  # before opening, which can have side effects on a device
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """Read a whole file.

    Args:
        path: the file.
        limit: maximum number of bytes.

    Raises:
        OSError: as in `open_regular`, or the file is longer.
    """
    with open_regular(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit:,} bytes", str(path))
    return content


def read_small_text(path: Path, limit: int = SMALL) -> str:
    """Read a whole file of UTF-8 text.

    Raises:
        OSError: as in `read_small`.
        UnicodeDecodeError: the file is not UTF-8 text.
    """
    return read_small(path, limit).decode("utf-8")


def parse_json(text: bytes | str) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def lines_of(stream: BinaryIO, longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """The lines of a file, including line ends.

    Raises:
        ValueError: a line is longer than `longest` bytes.
    """
    while line := stream.readline(longest + 1):
        if len(line) > longest:
            raise ValueError(f"a line of more than {longest:,} bytes")
        yield line


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
