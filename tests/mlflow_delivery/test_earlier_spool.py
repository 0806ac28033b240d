"""What an earlier version left in `spool/`: delivered first, once, and its files go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.mlflow_delivery.earlier_spool import SpoolReader
from keel_megatron.mlflow_delivery.outbox_reader import Waiting
from keel_megatron.mlflow_delivery.sync import sync
from tests.mlflow_delivery.session import EarlierSession, Session, deliver
from tests.tracking.samples import config, history, mlflow_runs


def steps(items: list[Any]) -> list[int]:
    return [item.values["step"] for item in items if item.kind == "metrics"]


def test_what_waits_in_a_spool_is_delivered_by_sync(tmp_path: Path) -> None:
    run = config(tmp_path)
    session = EarlierSession(run, "a")
    session.losses({1: 5.0, 2: 4.0})
    session.put("system", stream="system-x", values={"system/x/disk_usage_percentage": 7.0})
    session.put("end", status="KILLED")
    assert str(Waiting.of(session.folder)) == "3 point(s) and the status KILLED"
    assert "delivered 3 point(s) and the status KILLED to MLflow" in sync(session.folder)[0]
    (found,) = mlflow_runs(run)
    assert found.info.status == "KILLED"
    assert history(run, found.info.run_id, "train/loss") == [(1, 5.0), (2, 4.0)]
    assert {path.name for path in session.spool.iterdir()} == {"delivered.json", "target.json"}
    assert "nothing to deliver" in sync(session.folder)[0]


def test_a_run_that_this_version_resumes_gets_it_before_its_own_records(tmp_path: Path) -> None:
    run = config(tmp_path)
    earlier = EarlierSession(run, "a")
    earlier.losses({1: 5.0, 2: 4.0})
    lines = [{"step": step, "loss": 6.0 - step} for step in (1, 2)]
    (earlier.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    session = Session(run, "b", back_to=2)
    session.losses({3: 3.0})
    session.put("end", status="FINISHED")
    deliver(session.folder)
    (found,) = mlflow_runs(run)
    assert found.info.status == "FINISHED"
    assert history(run, found.info.run_id, "train/loss") == [(1, 5.0), (2, 4.0), (3, 3.0)]


def test_values_that_a_later_start_or_rewind_computed_again_are_left_out(tmp_path: Path) -> None:
    session = EarlierSession(config(tmp_path), "a")
    session.losses(dict.fromkeys((1, 2, 3, 4), 0.5))
    session.put("rewind", back_to=2)
    session.losses(dict.fromkeys((3, 4, 5), 0.5))
    reader = SpoolReader(session.folder)
    seen = list(reader.waiting())
    assert steps(seen) == [1, 2, 3, 4, 5]
    reader.commit(seen[:3])
    EarlierSession(config(tmp_path), "b", back_to=3)
    assert steps(list(reader.waiting())) == [3]
    assert reader.last_start["name"] == "b"
    assert not reader.ended


@pytest.mark.security
def test_a_line_of_nobody_s_writer_is_no_item(tmp_path: Path) -> None:
    session = EarlierSession(config(tmp_path), "a")
    session.losses({1: 5.0})
    for values in ({"step": "2", "values": {}}, {"step": 2, "values": 3}, {"step": 2}):
        session.put("metrics", **values)
    session.put("end", time="never", status="FINISHED")
    session.put("start", name="a", back_to="b")
    session.put("artifact", path=["a"])
    with (session.spool / "events.000001.jsonl").open("a") as file:
        file.write('[]\n3\n"end"\nnull\n{}\n{"kind": "tags')
    for note in ("[]", "3", '{"streams": 3, "session": []}', '{"streams": {"events": 1}}'):
        (session.spool / "delivered.json").write_text(note)
        assert steps(list(SpoolReader(session.folder).waiting())) == [1]
