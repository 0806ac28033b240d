"""The spool: what was written is read once, in order, whatever ended in between."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.tracking import spool
from keel_megatron.tracking.spool import EVENTS, SpoolReader, SpoolWriter, Waiting, relative


def metrics(writer: SpoolWriter, *steps: int) -> None:
    for step in steps:
        writer.append("metrics", step=step, time=step, values={"loss": 1.0 / step})


def steps(items: list[Any]) -> list[int]:
    return [item.values["step"] for item in items if item.kind == "metrics"]


def test_items_come_once_and_in_order_and_their_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "SEGMENT_BYTES", 300)
    writer = SpoolWriter(tmp_path, EVENTS)
    metrics(writer, *range(1, 21))
    files = spool.segments(tmp_path / "spool", EVENTS)
    assert len(files) > 3
    first = list(SpoolReader(tmp_path).waiting())[:12]
    assert steps(first) == list(range(1, 13))
    SpoolReader(tmp_path).commit(first)
    assert len(spool.segments(tmp_path / "spool", EVENTS)) < len(files)
    rest = list(SpoolReader(tmp_path).waiting())
    assert steps(rest) == list(range(13, 21))
    reader = SpoolReader(tmp_path)
    reader.commit(rest)
    assert not Waiting.of(tmp_path)
    reader.tidy()
    assert spool.segments(tmp_path / "spool", EVENTS) == []
    metrics(SpoolWriter(tmp_path, EVENTS), 21)  # a number that was used is not used again
    assert steps(list(SpoolReader(tmp_path).waiting())) == [21]


def test_a_line_that_a_kill_cut_short_harms_no_other(tmp_path: Path) -> None:
    metrics(SpoolWriter(tmp_path, EVENTS), 1, 2)
    (path,) = (p for _, p in spool.segments(tmp_path / "spool", EVENTS))
    path.write_bytes(path.read_bytes()[:-9])
    metrics(SpoolWriter(tmp_path, EVENTS), 3)
    assert steps(list(SpoolReader(tmp_path).waiting())) == [1, 3]


def test_values_that_a_later_start_or_rewind_computes_again_are_left_out(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, EVENTS)
    metrics(writer, 1, 2, 3, 4)
    writer.append("rewind", back_to=2, time=0)
    metrics(writer, 3, 4, 5)
    reader = SpoolReader(tmp_path)
    seen = list(reader.waiting())
    assert steps(seen) == [1, 2, 3, 4, 5]
    reader.commit(seen[:2])
    SpoolWriter(tmp_path, EVENTS).append("start", back_to=3, time=0, name="b")
    assert steps(list(reader.waiting())) == [3]
    assert reader.last_start["name"] == "b"
    assert not reader.ended


def test_a_full_disk_keeps_items_until_there_is_room(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, EVENTS)
    metrics(writer, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        metrics(writer, 2, 3)
        assert writer.unwritten == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics(writer, 4)
    assert writer.unwritten == 0
    assert steps(list(SpoolReader(tmp_path).waiting())) == [1, 2, 3, 4]


def test_what_waits_is_counted(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, EVENTS)
    metrics(writer, 1, 2)
    assert str(Waiting.of(tmp_path)) == "2 point(s)"
    writer.append("artifact", path="loss.png")
    writer.append("end", status="FAILED", time=0)
    SpoolWriter(tmp_path, "system-a").append("system", time=0, values={"x": 1.0, "y": 2.0})
    assert str(Waiting.of(tmp_path)) == "4 point(s), 1 file(s) and the status FAILED"


def test_paths_survive_a_move_of_the_run(tmp_path: Path) -> None:
    assert relative(tmp_path, tmp_path / "a" / "b.txt") == "a/b.txt"
    assert relative(tmp_path, tmp_path.parent / "b.txt") == str(tmp_path.parent / "b.txt")
