"""Databases of earlier versions, one in every run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keel_megatron.errors import UserError
from keel_megatron.mlflow_delivery import takeover
from keel_megatron.mlflow_delivery.client import open_client
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_uri
from keel_megatron.mlflow_delivery.sync import sync
from keel_megatron.mlflow_delivery.takeover import TAKEN_OVER, take_over_now
from keel_megatron.mlflow_delivery.target import remembered_run_id
from tests.mlflow_delivery.session import Session, deliver
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs, template


@pytest.fixture
def earlier(tmp_path: Path) -> Any:
    """A run whose folder has a database with a run of 2,500 points, a note and a file."""
    from mlflow.entities import Metric

    run = config(tmp_path)
    folder = run.training.folder
    folder.mkdir()
    (folder / "config.yaml").touch()
    (folder / "mlflow.db").write_bytes(template())
    client = open_client(sqlite_uri(folder / "mlflow.db"))
    experiment = client.create_experiment("keel", (folder / "mlflow_artifacts").as_uri())
    tags = {"mlflow.note.content": "the good one", "mine": "kept"}
    made = client.create_run(experiment, start_time=1000, run_name="my name", tags=tags)
    run_id = made.info.run_id
    client.log_param(run_id, "training.steps", "4")
    points = [Metric("loss", 1.0 / step, step, step) for step in range(1, 2501)]
    for start in range(0, 2500, 1000):
        client.log_batch(run_id, metrics=points[start : start + 1000])
    client.log_metric(run_id, "depth/stream_rms/max", 5.0, step=1)
    client.set_terminated(run_id, "KILLED", end_time=9000)
    files = folder / "mlflow_artifacts" / run_id / "artifacts"
    files.mkdir(parents=True)
    (files / "note.txt").write_text("kept")
    (folder / "mlflow_run_id").write_text(run_id + "\n")
    return run


def check(run: Any) -> str:
    (found,) = mlflow_runs(run)
    assert (found.info.status, found.info.run_name) == ("KILLED", "my name")
    assert (found.info.start_time, found.info.end_time) == (1000, 9000)
    assert found.data.params == {"training.steps": "4"}
    assert found.data.tags["mlflow.note.content"] == "the good one"
    assert found.data.tags["mine"] == "kept"
    assert set(found.data.metrics) == {"train/loss", "depth.stream_rms.max"}
    run_id = str(found.info.run_id)
    wanted = [(step, 1.0 / step) for step in range(1, 2501)]
    assert sorted(history(run, run_id, "train/loss")) == wanted
    assert remembered_run_id(run.training.folder) == run_id
    assert [file.path for file in mlflow_client(run).list_artifacts(run_id)] == ["note.txt"]
    return run_id


def test_it_is_taken_over_once_with_points_notes_and_files(
    earlier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that is interrupted half way."""
    folder = earlier.training.folder
    before = (folder / "mlflow.db").read_bytes()
    whole = takeover.move_artifacts

    def killed(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(takeover, "move_artifacts", killed)
    with pytest.raises(KeyboardInterrupt):
        take_over_now(folder)
    assert (folder / "mlflow.db").exists()
    monkeypatch.setattr(takeover, "move_artifacts", whole)
    lines = sync(folder)
    assert lines == [f"{folder}: its own database is in {folder.parent}/mlflow.db now"]
    check(earlier)
    assert not (folder / "mlflow.db").exists()
    assert (folder / "mlflow.db.taken_over").read_bytes() == before
    assert not take_over_now(folder)
    assert len(mlflow_runs(earlier)) == 1


def test_a_resumed_run_takes_its_own_over(earlier: Any) -> None:
    Session(earlier, "b", back_to=2500)
    said: list[str] = []
    deliver(earlier.training.folder, said)
    assert said == []
    (found,) = mlflow_runs(earlier)
    assert TAKEN_OVER in found.data.tags
    assert len(history(earlier, found.info.run_id, "train/loss")) == 2500


@pytest.mark.security
def test_one_that_cannot_be_read_stays_and_is_said(tmp_path: Path) -> None:
    run = config(tmp_path)
    folder = run.training.folder
    folder.mkdir()
    (folder / "config.yaml").touch()
    (folder / "mlflow.db").write_bytes(b"half of a database" * 100)
    with pytest.raises(UserError, match=f"{folder}/mlflow.db cannot be read"):
        sync(folder)
    assert (folder / "mlflow.db").exists()
