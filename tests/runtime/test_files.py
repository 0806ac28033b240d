"""Files on a full disk: nothing is half, nothing ends the run, and all is there in the end."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.errors import UserError
from keel_megatron.runtime.files import LineFile, check_output, write_output, write_whole
from tests.disk import Disk


@settings(deadline=None, max_examples=50)
@given(rooms=st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_a_line_is_whole_or_absent_and_comes_once_there_is_room(
    tmp_path_factory: pytest.TempPathFactory, rooms: list[int]
) -> None:
    path = tmp_path_factory.mktemp("lines") / "log.txt"
    said: list[str] = []
    lines = [f"line {number} {'x' * number}" for number in range(len(rooms))]
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch)
        file = LineFile(path, said.append)
        for line, room in zip(lines, rooms, strict=True):
            disk.room = room
            file.append(line)
            found = path.read_text()
            assert found == "".join(f"{one}\n" for one in lines[: found.count("\n")])
        disk.room = 1 << 40
        file.append("the last")
        file.close()
    assert path.read_text().splitlines() == [*lines, "the last"]
    assert [("cannot write" in one) for one in said] == [True, False] * (len(said) // 2)


def test_memory_has_a_limit_and_what_was_lost_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, said = Disk(monkeypatch), list[str]()
    file = LineFile(tmp_path / "log.txt", said.append, limit=100)
    disk.room = 0
    for number in range(50):
        file.append(f"line {number:03}", must=number == 40)
    assert file.kept_bytes <= 120
    assert len(said) == 1
    assert "No space left on device" in said[0]
    disk.room = 1 << 40
    assert file.write()
    found = (tmp_path / "log.txt").read_text().splitlines()
    assert found == [*(f"line {number:03}" for number in range(11)), "line 040"]
    assert "is written again; 38 lines were dropped" in said[1]


def test_a_file_that_can_never_be_written_is_told_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said: list[str] = []
    file = LineFile(tmp_path / "file" / "log.txt", said.append)
    file.append("one")
    file.close()
    assert "File exists" in said[0]
    assert said[1].endswith("lacks 1 lines, for which there was no room")


def test_a_line_that_a_kill_cut_short_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("one\nhalf")
    LineFile(path).append("two")
    assert path.read_text() == "one\ntwo\n"


def test_a_whole_file_is_replaced_or_left(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    write_whole(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(path, "new and longer")
        write_whole(path, "old")  # is there: no room is needed
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [one.name for one in tmp_path.iterdir()] == ["stages.json"]
    assert path.read_text() == "old"


@pytest.mark.security
@pytest.mark.parametrize("name", ["log.txt", "stages.json.partial", "stages.json"])
def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path, name: str) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(thesis)
    LineFile(run / "log.txt").append("line")
    write_whole(run / "stages.json", "{}")
    assert thesis.read_text() == "years of work"
    assert (run / "stages.json").read_text() == "{}"
    assert not os.path.islink(run / "stages.json")


def test_an_output_that_is_a_pipe_is_written_not_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, link):
        check_output("--out", path)
        write_output("--out", path, "é\n")
        assert os.read(reader, 100) == "é\n".encode()
    os.close(reader)
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, pipe]


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    real, link = tmp_path / "data" / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    for content in (b"new", b"newer"):  # at first the link leads to no file
        check_output("--out", link)
        write_output("--out", link, content)
        assert real.read_bytes() == content
        assert link.is_symlink()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["real.json"]


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    lost.symlink_to(tmp_path / "no" / "out")
    for out, expected in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "out", "No such file or directory"),
        (lost, "No such file or directory"),
    ):
        with pytest.raises(UserError, match=f"--x: {out} cannot be written: {expected}"):
            check_output("--x", out)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"--x: .*/folder cannot be written: Is a directory"):
        write_output("--x", tmp_path / "folder", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "lost"]
