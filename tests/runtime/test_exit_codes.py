"""The file exit_code: whole or not at all, on a full disk too."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from keel_megatron.runtime import exit_codes

pytestmark = pytest.mark.security


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_start_removes_what_an_earlier_one_left(tmp_path: Path) -> None:
    exit_codes.write(tmp_path, 75)
    assert (tmp_path / "exit_code").read_text() == "75\n"
    exit_codes.clear(tmp_path)
    assert "exit_code" not in names(tmp_path)
    exit_codes.write(tmp_path, 0)
    assert (tmp_path / "exit_code").read_text() == "0\n"
    assert names(tmp_path) == {"exit_code"}
    exit_codes.clear(tmp_path / "absent")


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> int:
        raise OSError(28, "No space left on device")

    exit_codes.clear(tmp_path)
    monkeypatch.setattr(os, "write", fails)
    exit_codes.write(tmp_path, 75)
    assert "exit_code" not in names(tmp_path)
    assert "exit_code: No space left on device" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_takes_the_code(small_disk: Path) -> None:
    exit_codes.clear(small_disk)
    with pytest.raises(OSError, match="No space left"), (small_disk / "f").open("wb") as file:
        file.write(bytes(64 * 1024))
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "another").write_text("75\n")
    exit_codes.write(small_disk, 75)
    assert (small_disk / "exit_code").read_text() == "75\n"


def test_an_exit_code_is_written_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_codes.write(tmp_path, 75)
    assert [path.name for path in tmp_path.iterdir()] == ["exit_code"]
    assert (tmp_path / "exit_code").read_text() == "75\n"
    exit_codes.write(tmp_path / "gone", 0)
    assert "cannot write" in capsys.readouterr().err
