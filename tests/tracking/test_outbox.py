"""The event log and the nodes' measurements."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from keel_megatron.tracking import outbox
from keel_megatron.tracking.outbox import EventLog, MeasurementLog, relative, segments


def kinds(run: Path) -> list[str]:
    lines = (run / "outbox" / "events.jsonl").read_text().splitlines()
    return [json.loads(line)["kind"] for line in lines]


def test_a_line_that_a_kill_cut_short_harms_no_other(tmp_path: Path) -> None:
    EventLog(tmp_path).append("start", name="a")
    EventLog(tmp_path).append("end", status="FINISHED")
    path = tmp_path / "outbox" / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    EventLog(tmp_path).append("tags", tags={})
    assert kinds(tmp_path) == ["start", "tags"]


def test_a_full_disk_keeps_events_until_there_is_room(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append("start")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        log.append("tags")
        log.append("rewind")
        assert log.unwritten == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.append("end")
    assert log.unwritten == 0
    assert kinds(tmp_path) == ["start", "tags", "rewind", "end"]


def test_the_newest_measurements_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "SEGMENT_BYTES", 300)
    values = iter(range(1000))
    for _start in range(3):
        log = MeasurementLog(tmp_path, "a", limit=2000)
        for _ in range(50):
            log.append({"x": float(next(values))})
        log.close()
    MeasurementLog(tmp_path, "b").append({"x": -1.0})
    files = [path for _number, path in segments(tmp_path / "outbox", "system-a")]
    assert sum(path.stat().st_size for path in files) < 2500
    found = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    numbers = [line["values"]["x"] for line in found]
    assert numbers == [float(n) for n in range(150 - len(numbers), 150)]
    assert len(numbers) > 15


def test_measurements_of_a_time_without_a_folder_come_later(tmp_path: Path) -> None:
    (tmp_path / "outbox").touch()  # no file can be made in it
    log = MeasurementLog(tmp_path, "a")
    for number in range(100):
        log.append({"x": float(number)})
    (tmp_path / "outbox").unlink()
    log.append({"x": 100.0})
    (path,) = (path for _number, path in segments(tmp_path / "outbox", "system-a"))
    assert path.read_text().count("\n") == 101


def test_paths_survive_a_move_of_the_run(tmp_path: Path) -> None:
    assert relative(tmp_path, tmp_path / "a" / "b.txt") == "a/b.txt"
    assert relative(tmp_path, tmp_path.parent / "b.txt") == str(tmp_path.parent / "b.txt")
