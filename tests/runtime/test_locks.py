"""Locks on files, also where the file system has none."""

from __future__ import annotations

import errno
import fcntl
import tempfile
import threading
from pathlib import Path

import pytest

from keel_megatron.runtime.locks import locked
from tests.locks import without_locks


def waits(path: Path) -> bool:
    """Whether another holder of the lock has to wait."""
    heard = threading.Event()

    def hold() -> None:
        with locked(path, heard.set):
            pass

    with locked(path):
        other = threading.Thread(target=hold)
        other.start()
        has_waited = heard.wait(60)
    other.join()
    return has_waited


def test_one_holds_it_and_others_wait(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as has_locks:
        assert has_locks
    assert waits(tmp_path / "lock")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    without_locks(monkeypatch, tmp_path / "shared")
    (tmp_path / "shared").mkdir()
    with locked(tmp_path / "shared" / "lock") as has_locks:
        assert not has_locks
    assert waits(tmp_path / "shared" / "lock")  # for a process of this machine
    without_locks(monkeypatch, tmp_path)
    with locked(tmp_path / "shared" / "lock") as has_locks:
        assert not has_locks


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "lock"):
        pass
