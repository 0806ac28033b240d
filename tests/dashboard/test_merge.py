"""Many runs' databases as one."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from keel_megatron.dashboard import merge
from keel_megatron.dashboard.merge import MergedStore
from keel_megatron.mlflow_delivery.mlflow_run import MlflowRun, Point
from keel_megatron.mlflow_delivery.target import Target
from tests.tracking.samples import config


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute(sql).fetchall()
        database.commit()
        return rows


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with three steps and a file in MLflow."""
    home = tmp_path_factory.mktemp("run")
    run = config(home, training__name="first")
    run.training.folder.mkdir(parents=True)
    store = MlflowRun(run.training.folder, Target.of(run))
    store.start("once", None, 1000)
    store.log([Point("loss", 4.0 / step, step, 1000 + step) for step in (1, 2, 3)])
    (home / "picture.png").write_text("a picture")
    store.log_file(home / "picture.png")
    return run.training.folder


@pytest.fixture
def runs(original: Path, tmp_path: Path) -> list[Path]:
    """The databases of two runs in folders that were moved; in each the experiment has a number."""
    found = []
    for name, number in (("first", 1), ("second", 7)):
        folder = tmp_path / name
        shutil.copytree(original, folder)
        database = folder / "mlflow.db"
        (before,) = query(database, "SELECT run_uuid FROM runs")[0]
        after = name.ljust(32, "0")
        for table in ("runs", "metrics", "latest_metrics", "params", "tags"):
            query(database, f"UPDATE {table} SET run_uuid = '{after}'")
        for table in ("runs", "experiments"):
            query(database, f"UPDATE {table} SET experiment_id = {number} WHERE experiment_id != 0")
        query(database, f"UPDATE runs SET name = '{name}'")
        (folder / "mlflow_artifacts" / str(before)).rename(folder / "mlflow_artifacts" / after)
        found.append(database)
    return found


@pytest.fixture
def target(original: Path, tmp_path: Path) -> Path:
    """A database as the server makes it: tables, and nothing but the default experiment."""
    path = tmp_path / "merged.db"
    shutil.copy(original / "mlflow.db", path)
    for table in ("runs", "metrics", "latest_metrics", "params", "tags"):
        query(path, f"DELETE FROM {table}")
    query(path, "DELETE FROM experiments WHERE experiment_id != 0")
    return path


def test_all_runs_are_there_under_one_experiment(runs: list[Path], target: Path) -> None:
    store = MergedStore(target, runs)
    assert store.refresh() == []
    names = query(
        target, "SELECT r.name, e.name FROM runs r JOIN experiments e USING(experiment_id)"
    )
    assert sorted(names) == [("first", "keel"), ("second", "keel")]
    shown = query(target, "SELECT name FROM experiments WHERE lifecycle_stage = 'active'")
    assert shown == [("keel",)], "without MLflow's empty Default"
    for run in runs:
        for table in ("metrics", "latest_metrics", "params", "tags"):
            wanted = query(run, f"SELECT * FROM {table}")
            assert wanted
            uuid = run.parent.name.ljust(32, "0")
            found = query(target, f"SELECT * FROM {table} WHERE run_uuid = '{uuid}'")
            assert sorted(found) == sorted(wanted)
    pages = dict(store.run_pages())
    assert pages.keys() == {"first", "second"}
    assert f"/runs/{'first'.ljust(32, '0')}?" in pages["first"]


def test_files_are_where_the_folder_is_now(runs: list[Path], target: Path) -> None:
    MergedStore(target, runs).refresh()
    for (uri,) in query(target, "SELECT artifact_uri FROM runs"):
        folder = Path(str(uri).removeprefix("file://"))
        assert folder.is_relative_to(target.parent)
        assert (folder / "picture.png").read_text() == "a picture"


def test_what_is_new_is_added_and_the_runs_are_only_read(runs: list[Path], target: Path) -> None:
    store = MergedStore(target, runs)
    store.refresh()
    before = [run.read_bytes() for run in runs]
    first = "first".ljust(32, "0")
    query(runs[0], f"INSERT INTO metrics VALUES ('loss', 0.5, 2000, '{first}', 4, 0)")
    query(runs[0], "UPDATE runs SET status = 'FINISHED'")
    changed = runs[0].read_bytes()
    store.refresh()
    losses = query(
        target, f"SELECT step, value FROM metrics WHERE run_uuid = '{first}' ORDER BY step"
    )
    assert losses == [(1, 4.0), (2, 2.0), (3, 4.0 / 3), (4, 0.5)]
    assert query(target, "SELECT name, status FROM runs ORDER BY name") == [
        ("first", "FINISHED"),
        ("second", "RUNNING"),
    ]
    assert [run.read_bytes() for run in runs] == [changed, before[1]]


@pytest.mark.parametrize("machine_after", [False, True])
def test_what_a_resumed_run_takes_back_goes(
    runs: list[Path], target: Path, machine_after: bool
) -> None:
    """Row numbers are used again, unless a row that stays is behind them."""
    first = "first".ljust(32, "0")
    if machine_after:
        query(runs[0], f"INSERT INTO metrics VALUES ('system/cpu', 9.0, 1500, '{first}', 3, 0)")
    store = MergedStore(target, runs)
    store.refresh()
    query(runs[0], "DELETE FROM metrics WHERE key = 'loss' AND step > 1")
    for step, loss in ((2, 2.5), (3, 1.5)):
        query(runs[0], f"INSERT INTO metrics VALUES ('loss', {loss}, 3000, '{first}', {step}, 0)")
    store.refresh()
    wanted = "SELECT step, value FROM metrics WHERE key = 'loss' AND run_uuid = "
    found = query(target, f"{wanted}'{first}' ORDER BY step")
    assert found == [(1, 4.0), (2, 2.5), (3, 1.5)]
    assert query(target, f"SELECT count(*) FROM metrics WHERE run_uuid != '{first}'") == [(3,)]


def test_a_database_that_cannot_be_read_stops_no_other(runs: list[Path], target: Path) -> None:
    whole = runs[0].read_bytes()
    runs[0].write_bytes(b"half of a database")
    store = MergedStore(target, runs)
    (problem,) = store.refresh()
    assert problem.startswith(str(runs[0]))
    assert query(target, "SELECT name FROM runs") == [("second",)]
    runs[0].write_bytes(whole)
    assert store.refresh() == []
    assert query(target, "SELECT count(*) FROM runs") == [(2,)]


def test_a_huge_database_costs_its_run_alone(
    runs: list[Path], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "LARGEST", 4 << 30)
    with runs[0].open("ab") as file:
        file.truncate(200 << 30)  # takes no room, but would be copied
    (problem,) = MergedStore(target, runs).refresh()
    assert "mlflow.db: it has 214.7 GB, and the dashboard copies up to 4.3 GB of a run" in problem
    assert query(target, "SELECT name FROM runs") == [("second",)]


@pytest.mark.security
def test_a_hostile_database_costs_its_run_alone(runs: list[Path], target: Path) -> None:
    """A view would be a query without an end; a number that is a text, a part of our queries."""
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x FROM n"
    query(runs[0], "ALTER TABLE metrics RENAME TO old")
    query(runs[0], f"CREATE VIEW metrics AS {endless}")
    (problem,) = MergedStore(target, runs).refresh()
    assert problem.endswith("metrics is a view, not a table")
    query(runs[0], "DROP VIEW metrics")
    query(runs[0], "ALTER TABLE old RENAME TO metrics")
    for table in ("runs", "experiments"):
        query(runs[0], f"CREATE TABLE copy AS SELECT * FROM {table}")
        query(runs[0], f"DROP TABLE {table}")
        query(runs[0], f"CREATE TABLE {table} AS SELECT * FROM copy")
        query(runs[0], "DROP TABLE copy")
        query(runs[0], f"UPDATE {table} SET experiment_id = '1 OR 1 = 1'")
    (problem,) = MergedStore(target, runs).refresh()
    assert "1 OR 1 = 1" in problem
    assert query(target, "SELECT name FROM runs") == [("second",)]
