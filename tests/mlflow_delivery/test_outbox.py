"""The spool: what was written is read once, in order, whatever ended in between."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.mlflow_delivery import outbox
from keel_megatron.mlflow_delivery.outbox import EVENTS, SpoolReader, SpoolWriter, Waiting, relative


def metrics(writer: SpoolWriter, *steps: int) -> None:
    for step in steps:
        writer.append("metrics", step=step, time=step, values={"loss": 1.0 / step})


def steps(items: list[Any]) -> list[int]:
    return [item.values["step"] for item in items if item.kind == "metrics"]


def test_items_come_once_and_in_order_and_their_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "SEGMENT_BYTES", 300)
    writer = SpoolWriter(tmp_path, EVENTS)
    metrics(writer, *range(1, 21))
    files = outbox.segments(tmp_path / "spool", EVENTS)
    assert len(files) > 3
    first = list(SpoolReader(tmp_path).waiting())[:12]
    assert steps(first) == list(range(1, 13))
    SpoolReader(tmp_path).commit(first)
    assert len(outbox.segments(tmp_path / "spool", EVENTS)) < len(files)
    rest = list(SpoolReader(tmp_path).waiting())
    assert steps(rest) == list(range(13, 21))
    reader = SpoolReader(tmp_path)
    reader.commit(rest)
    assert not Waiting.of(tmp_path)
    reader.tidy()
    assert outbox.segments(tmp_path / "spool", EVENTS) == []
    metrics(SpoolWriter(tmp_path, EVENTS), 21)  # a number that was used is not used again
    assert steps(list(SpoolReader(tmp_path).waiting())) == [21]


def test_a_line_that_a_kill_cut_short_harms_no_other(tmp_path: Path) -> None:
    metrics(SpoolWriter(tmp_path, EVENTS), 1, 2)
    (path,) = (p for _, p in outbox.segments(tmp_path / "spool", EVENTS))
    path.write_bytes(path.read_bytes()[:-9])
    metrics(SpoolWriter(tmp_path, EVENTS), 3)
    assert steps(list(SpoolReader(tmp_path).waiting())) == [1, 3]


@pytest.mark.security
def test_a_line_of_nobody_s_writer_is_no_item(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, EVENTS)
    metrics(writer, 1)
    for values in ({"step": "2", "values": {}}, {"step": 2, "values": 3}, {"step": 2}):
        writer.append("metrics", time=1, **values)
    writer.append("end", time="never", status="FINISHED")
    writer.append("start", time=1, name="a", back_to="b")
    writer.append("artifact", time=1, path=["a"])
    (path,) = (p for _, p in outbox.segments(tmp_path / "spool", EVENTS))
    path.write_bytes(path.read_bytes() + b'[]\n3\n"end"\nnull\n{}\n')
    metrics(SpoolWriter(tmp_path, EVENTS), 2)
    for note in ("[]", "3", '{"streams": 3, "session": []}', '{"streams": {"events": 1}}'):
        (tmp_path / "spool" / "delivered.json").write_text(note)
        assert steps(list(SpoolReader(tmp_path).waiting())) == [1, 2]


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


def test_an_outbox_that_nobody_empties_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points alone are left out, and only until there is room again."""
    monkeypatch.setattr(outbox, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "SEGMENT_BYTES", 300)
    writer = SpoolWriter(tmp_path, EVENTS, limit=1000)
    metrics(writer, *range(1, 101))
    size = sum(path.stat().st_size for _, path in outbox.segments(tmp_path / "spool", EVENTS))
    assert size < 1100
    reader = SpoolReader(tmp_path)
    waiting = list(reader.waiting())
    assert writer.left_out == 100 - len(waiting) > 50
    writer.append("end", time=0, status="FINISHED")
    assert list(reader.waiting())[-1].kind == "end"
    reader.commit(waiting)
    metrics(writer, 101)
    assert steps(list(SpoolReader(tmp_path).waiting())) == [101]


def test_a_full_disk_fills_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(outbox, "UNWRITTEN_BYTES", 500)
    writer = SpoolWriter(tmp_path / "gone", EVENTS)
    (tmp_path / "gone" / "spool").rmdir()
    (tmp_path / "gone" / "spool").touch()  # no file can be made in it
    metrics(writer, *range(1, 101))
    assert 0 < writer.unwritten < 12
    assert writer.left_out == 100 - writer.unwritten
    (tmp_path / "gone" / "spool").unlink()
    metrics(writer, 101)
    kept = steps(list(SpoolReader(tmp_path / "gone").waiting()))
    assert (kept[0], kept[-1], writer.unwritten) == (1, 101, 0)
