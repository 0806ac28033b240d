"""A file system that has no locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

_FLOCK = fcntl.flock


def without_locks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have the files below a folder refuse locks."""

    def flock(descriptor: int, operation: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_relative_to(folder.resolve()):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        _FLOCK(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
