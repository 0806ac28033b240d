"""A rebuild: MLflow's database is a view of the runs' logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keel_megatron.mlflow_delivery.sync import sync
from keel_megatron.mlflow_delivery.target import remembered_run_id
from tests.depth.test_profile import profile
from tests.mlflow_delivery.session import Session, deliver
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs


def trained(run: Any) -> Session:
    """Two starts, a rollback, an end; all delivered."""
    first = Session(run, "a")
    (first.folder / "config.yaml").touch()
    first.put("tags", tags={"layout": "TP 1"})
    first.losses({1: 5.0, 2: 4.0, 3: 3.0})
    line = {"kind": "system", "time": first.time + 9000, "values": {"system/x/disk": 7.0}}
    (first.folder / "outbox" / "system-x.1.jsonl").write_text(json.dumps(line) + "\n")
    deliver(first.folder, to=run.tracking.uri)
    second = Session(run, "b", back_to=2)
    second.log.write(profile(3))
    second.losses({3: 3.5, 4: 2.5})
    second.rewind(3)
    second.losses({4: 2.25})
    second.put("end", status="FINISHED")
    deliver(second.folder, to=run.tracking.uri)
    return second


def test_a_rebuild_into_the_run_doubles_nothing_and_keeps_what_people_added(
    tmp_path: Path,
) -> None:
    run = config(tmp_path, tracking__uri=f"sqlite:///{tmp_path / 'all.db'}")
    folder = trained(run).folder
    (found,) = mlflow_runs(run)
    run_id, names = found.info.run_id, sorted(found.data.metrics)
    client = mlflow_client(run)
    client.set_tag(run_id, "mine", "kept")
    client.set_tag(run_id, "mlflow.note.content", "my note")
    client.update_run(run_id, name="the good one")
    before = {name: sorted(history(run, run_id, name)) for name in names}
    (line,) = sync(folder, [str(run.tracking.uri)], rebuild=True)
    assert line.startswith(f"{folder}: delivered ")
    assert " point(s) again to MLflow" in line
    (again,) = mlflow_runs(run)
    assert again.info.run_id == run_id
    assert {name: sorted(history(run, run_id, name)) for name in names} == before
    added = {"mine": "kept", "mlflow.note.content": "my note", "mlflow.runName": "the good one"}
    assert again.data.tags == found.data.tags | added
    assert again.info.status == "FINISHED"
    assert (again.info.start_time, again.info.end_time) == (
        found.info.start_time,
        found.info.end_time,
    )
    assert "nothing to deliver" in sync(folder, [str(run.tracking.uri)])[0]


def test_a_rebuild_where_the_run_is_gone_makes_it_anew(tmp_path: Path) -> None:
    """As in a new database."""
    run = config(tmp_path, tracking__uri=f"sqlite:///{tmp_path / 'all.db'}")
    folder = trained(run).folder
    gone = remembered_run_id(folder)
    mlflow_client(run).delete_run(gone)
    lines = sync(folder, [str(run.tracking.uri)], rebuild=True)
    assert len(lines) == 1
    (found,) = mlflow_runs(run)
    assert found.info.run_id == remembered_run_id(folder) != gone
    assert (found.info.run_name, found.info.status) == ("test", "FINISHED")
    assert found.data.tags["layout"] == "TP 1"
    assert {name for name in found.data.tags if name.startswith("resumed.")} == {
        "resumed.1",
        "resumed.2",
    }
    points = history(run, found.info.run_id, "train/loss")
    assert points == [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.25)]
    assert history(run, found.info.run_id, "depth.stream_rms.max") == [(3, 1.0)]
    assert history(run, found.info.run_id, "system/x/disk")[0][1] == 7.0
