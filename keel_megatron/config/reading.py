"""Files that anybody may have written: what is read of them has a limit, and waits for nobody."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

SMALL = 1 << 20
"""Bytes that a configuration, a marker or a note may have."""
LARGE = 1 << 28
"""Bytes that a list over all tensors or files may have."""
LONGEST_LINE = 1 << 24
"""Bytes of a record that stands in one line."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read.

    Raises:
        OSError: it cannot be opened, or is something else: opening a FIFO would wait for its
            writer, and a device has no end.
    """
    _check_regular(path.stat(), path)  # before it is opened, which may do something to a device
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """A whole file.

    Args:
        path: the file.
        limit: bytes that it may have.

    Raises:
        OSError: as `open_regular`, or it is longer.
    """
    with open_regular(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit:,} bytes", str(path))
    return content


def read_small_text(path: Path, limit: int = SMALL) -> str:
    """A whole file of UTF-8 text.

    Raises:
        OSError: as `read_small`.
        UnicodeDecodeError: it is no such text.
    """
    return read_small(path, limit).decode("utf-8")


def parse_json(text: bytes | str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def lines_of(stream: BinaryIO, longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """A file's lines, with their ends.

    Raises:
        ValueError: one is longer than that.
    """
    while line := stream.readline(longest + 1):
        if len(line) > longest:
            raise ValueError(f"a line of more than {longest:,} bytes")
        yield line


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
