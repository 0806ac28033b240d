"""The log: each record once, and a cut that a follower can trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.tracking import run_log
from keel_megatron.tracking.metrics import MetricsFile, read_metrics
from keel_megatron.tracking.records import CheckpointRecord
from keel_megatron.tracking.run_log import RunLog
from tests.tracking.samples import record


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "outbox" / "events.jsonl").read_text().splitlines()]


def test_a_cut_is_logged_after_it_is_made_and_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before what stays of an earlier step is written anew behind it."""
    metrics, sizes = tmp_path / "metrics.jsonl", list[int]()
    log = RunLog(tmp_path, None, start={"name": "a"})
    for step in (1, 2, 3):
        log.write(record(step))
    log.write(CheckpointRecord(2, 0.1, 0.2, 100))
    whole = run_log.EventLog.append

    def append(self: Any, kind: str, **values: Any) -> None:
        sizes.append(metrics.stat().st_size)
        whole(self, kind, **values)

    monkeypatch.setattr(run_log.EventLog, "append", append)
    log.rewind(2)
    log.write(record(3))
    log.close()
    assert [line["step"] for line in read_metrics(metrics)] == [1, 2, 2, 3]
    log = RunLog(tmp_path, 1, start={"name": "b", "back_to": 1})
    log.event("end", status="FINISHED")
    log.close()
    found = [(event["kind"], event.get("metrics")) for event in events(tmp_path)]
    assert found == [("start", 0), ("rewind", sizes[0]), ("start", sizes[1]), ("end", None)]
    assert len(metrics.read_text().splitlines()[0]) + 1 == sizes[1]
    assert [line["step"] for line in read_metrics(metrics)] == [1]


def test_a_run_without_followers_has_no_event_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path, None)
    log.write(record(1))
    log.event("end", status="FINISHED")
    log.rewind(0)
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_profiles_of_an_earlier_version_are_cut_back_with_the_records(tmp_path: Path) -> None:
    path = tmp_path / "depth.jsonl"
    with MetricsFile(path) as earlier:
        for step in (1, 2, 4):
            earlier.write(record(step))
    log = RunLog(tmp_path, 3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    log.rewind(1)
    assert [line["step"] for line in read_metrics(path)] == [1]
    log.close()
    RunLog(tmp_path, None).close()
    assert read_metrics(path) == []
