"""A disk that is full, for the files that one process writes."""

from __future__ import annotations

import errno
import os

import pytest


class Disk:
    """Has room for so many bytes more; a write that does not fit is cut short, then refused.

    Args:
        monkeypatch: puts it in the place of `os.write`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 40
        self._write = os.write
        monkeypatch.setattr("keel_megatron.runtime.files.os.write", self.write)

    def write(self, descriptor: int, content: memoryview) -> int:
        """As `os.write`."""
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, content[: self.room])
        self.room -= written
        return written
