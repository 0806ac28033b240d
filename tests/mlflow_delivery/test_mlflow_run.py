"""The run as MLflow has it: its parameters, changes, names and database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from keel_megatron.mlflow_delivery.changes import Change
from keel_megatron.mlflow_delivery.delivery import Delivery
from tests.mlflow_delivery.session import Session, deliver
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs


def test_parameters_are_those_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sqlite file they are replaced; a server keeps the first, and tags say what is new."""
    first = config(tmp_path)
    Session(first, "a")
    deliver(first.training.folder)
    longer = config(tmp_path, training__steps=8)
    Session(longer, "b", back_to=0)
    deliver(first.training.folder)
    (found,) = mlflow_runs(longer)
    assert found.data.params["training.steps"] == "8"
    monkeypatch.setattr("keel_megatron.mlflow_delivery.mlflow_run.sqlite_file", lambda uri: None)
    for name, run, tag in (("c", first, "4"), ("d", longer, None)):
        Session(run, name, back_to=0)
        deliver(first.training.folder)
        (found,) = mlflow_runs(longer)
        assert found.data.params["training.steps"] == "8"
        assert found.data.tags.get("config.training.steps") == tag


def test_changed_settings_are_a_history_without_what_is_void(tmp_path: Path) -> None:
    run = config(tmp_path)
    session = Session(run, "a")
    session.put("tags", tags={"changed.optimizer.learning_rate": "0.1"})  # an earlier version's
    rate = [Change(step, "optimizer.learning_rate", 1e-3, 1e-4) for step in (6, 8)]
    steps = Change(6, "training.steps", 6, 12)
    long = Change(10, "data.text", None, ["x" * 9000])
    for changes, tags in (
        ([rate[0], steps, rate[1]], {"6": f"{rate[0]}; {steps}", "8": str(rate[1])}),
        ([rate[0], steps], {"6": f"{rate[0]}; {steps}"}),
        ([long], {"10": f"data.text null -> ['{'x' * 195}..."}),
        ([], {}),
    ):
        session.put("changes", changes=[change.to_json() for change in changes])
        deliver(session.folder)
        (found,) = mlflow_runs(run)
        shown = {k: v for k, v in found.data.tags.items() if k.startswith("changed.")}
        assert shown == {f"changed.step_{int(step):08d}": text for step, text in tags.items()}
    assert str(rate[0]) == "optimizer.learning_rate 0.001 -> 0.0001"


def test_names_of_an_earlier_version_are_brought_up_to_date(tmp_path: Path) -> None:
    """In the run's own database, so that a resumed run is one curve; others keep both names."""
    run = config(tmp_path)
    session = Session(run, "a")
    session.losses({1: 5.0})
    deliver(session.folder)
    with closing(sqlite3.connect(session.folder / "mlflow.db")) as database, database:
        for table in ("metrics", "latest_metrics"):
            database.execute(f"UPDATE {table} SET key = 'loss'")
            columns = "run_uuid, value, timestamp, step, is_nan"
            database.execute(
                f"INSERT INTO {table} (key, {columns}) "
                f"SELECT 'depth/stream_rms/max', {columns} FROM {table}"
            )
    session.losses({2: 4.0})
    deliver(session.folder)
    (found,) = mlflow_runs(run)
    assert found.data.metrics == {"train/loss": 4.0, "depth.stream_rms.max": 5.0}
    assert history(run, found.info.run_id, "train/loss") == [(1, 5.0), (2, 4.0)]


def test_an_infinite_value_is_nan(tmp_path: Path) -> None:
    """MLflow itself would make it 1.8e308."""
    run = config(tmp_path)
    session = Session(run, "a")
    session.record(1, loss=float("inf"), grad_norm=float("-inf"))
    deliver(session.folder)
    (found,) = mlflow_runs(run)
    assert {name: str(value) for name, value in found.data.metrics.items()} == {
        "train/loss": "nan",
        "train/grad_norm": "nan",
    }


def test_there_is_no_empty_default_experiment(tmp_path: Path) -> None:
    run = config(tmp_path)
    deliver(Session(run, "a").folder)
    assert [found.name for found in mlflow_client(run).search_experiments()] == ["keel"]
    default = config(tmp_path, training__name="other", tracking__experiment="Default")
    deliver(Session(default, "a").folder)
    assert len(mlflow_runs(default)) == 1


def test_a_server_keeps_the_points_and_is_told_that_they_are_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keel_megatron.mlflow_delivery.mlflow_run.sqlite_file", lambda uri: None)
    run = config(tmp_path)
    Session(run, "a").losses({1: 5.0, 2: 4.0})
    deliver(run.training.folder)
    Session(run, "b", back_to=1).losses({2: 4.5})
    deliver(run.training.folder)
    (found,) = mlflow_runs(run)
    assert sorted(history(run, found.info.run_id, "train/loss")) == [(1, 5.0), (2, 4.0), (2, 4.5)]
    assert found.data.tags["resumed.1"].endswith("of two points of a step the later counts")
    assert found.data.metrics["train/loss"] == 4.5


def test_a_database_that_was_never_finished_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow itself could not go on with it: its first index would be there already."""
    run = config(tmp_path)
    session = Session(run, "a")
    session.losses({1: 5.0})
    whole = MlflowClient.search_experiments

    def killed(self: Any, **options: Any) -> Any:
        raise OSError("killed")

    monkeypatch.setattr(MlflowClient, "search_experiments", killed)
    assert not Delivery(session.folder, [].append).deliver()
    assert not (session.folder / "mlflow.db").exists()
    (partial,) = session.folder.glob("mlflow.db.*.partial")
    with closing(sqlite3.connect(partial)) as database:
        database.execute("DROP TABLE IF EXISTS alembic_version")
        database.commit()
    monkeypatch.setattr(MlflowClient, "search_experiments", whole)
    deliver(session.folder)
    assert not partial.exists()
    assert history(run, mlflow_runs(run)[0].info.run_id, "train/loss") == [(1, 5.0)]
