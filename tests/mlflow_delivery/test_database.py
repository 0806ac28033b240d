"""The database that all runs of a folder share: made, shared, and killed while it is written."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.errors import UserError
from keel_megatron.mlflow_delivery import database as module
from keel_megatron.mlflow_delivery.client import open_client
from keel_megatron.mlflow_delivery.database import copy_foreign, database_of, prepare, why_foreign
from keel_megatron.mlflow_delivery.mlflow_run import MlflowRun, Point
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_uri
from keel_megatron.mlflow_delivery.target import Target
from tests.hosts import await_that
from tests.tracking.samples import config, history, mlflow_runs, template


def write_template(file: Path) -> None:
    file.write_bytes(template())


@pytest.fixture(autouse=True, scope="module")
def made_before() -> None:
    """The template, before tests replace what makes it."""
    template()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_it_is_an_ordinary_private_mlflow_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "make_tables", write_template)
    database = tmp_path / "mlflow.db"
    prepare(database)
    assert mode(database) == 0o600
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        connection.execute("CREATE TABLE written (x)")
        assert {mode(path) for path in tmp_path.iterdir()} == {0o600}, "its log, too"
    client = open_client(sqlite_uri(database))
    assert client.search_experiments() == []
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("mlflow.db", "mlflow.db-wal", "mlflow.db-shm", "mlflow.db.lock")
    }


def test_three_that_start_at_once_make_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock belongs to an open file, so threads stand for processes here."""
    made: list[Path] = []
    monkeypatch.setattr(module, "_open", lambda _database: None)

    def make_tables(file: Path) -> None:
        made.append(file)
        time.sleep(0.1)  # the others come meanwhile
        write_template(file)

    monkeypatch.setattr(module, "make_tables", make_tables)
    database = tmp_path / "mlflow.db"
    together = threading.Barrier(3)

    def start() -> int:
        together.wait()
        prepare(database)
        return database.stat().st_ino

    with ThreadPoolExecutor(3) as pool:
        inodes = {future.result() for future in [pool.submit(start) for _ in range(3)]}
    assert (len(made), len(inodes)) == (1, 1)


def test_the_first_stays_where_locks_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"

    def another_is_faster(file: Path) -> None:
        write_template(file)
        database.write_bytes(b"the first")

    monkeypatch.setattr(module, "make_tables", another_is_faster)
    module._create(database)
    assert database.read_bytes() == b"the first"


def test_what_a_killed_start_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow could not go on with half of its tables."""
    database = tmp_path / "mlflow.db"

    def killed(file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "make_tables", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(database)
    assert not database.exists()
    assert len(list(tmp_path.glob("mlflow.db.*.partial"))) == 2
    monkeypatch.setattr(module, "make_tables", write_template)
    prepare(database)
    assert list(tmp_path.glob("*.partial")) == []


def test_twenty_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each with an engine of its own, as every process has."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    runs = [config(tmp_path, training__name=f"run{number}") for number in range(20)]
    # MLflow's stores share one engine for each URI of a process.
    uris = [f"sqlite:///{tmp_path}{'/.' * number}/mlflow.db" for number in range(20)]

    def write(run: Any, uri: str) -> str:
        folder = run.training.folder
        folder.mkdir()
        store = MlflowRun(folder, Target.of(run))
        store._client = open_client(uri)
        assert isinstance(store._client._tracking_client.store, SqlAlchemyStore)
        store.start("once", None, 1000)
        for step in range(1, 6):
            store.log([Point("train/loss", 1.0 / step, step, 1000 + step)])
        store.end("FINISHED")
        return str(store.run_id)

    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(write, runs, uris))
    found = mlflow_runs(runs[0])
    assert {run.info.run_id for run in found} == set(ids)
    assert {run.info.status for run in found} == {"FINISHED"}
    wanted = [(step, 1.0 / step) for step in range(1, 6)]
    assert [history(runs[0], run_id, "train/loss") for run_id in ids] == [wanted] * 20


WRITES = """
import sys
from pathlib import Path
from keel_megatron.mlflow_delivery.mlflow_run import MlflowRun, Point
from keel_megatron.mlflow_delivery.target import Target
from tests.settings import small_config
name, steps = sys.argv[2], int(sys.argv[3])
run = small_config(training__runs_dir=sys.argv[1], training__name=name, tracking__mlflow=True)
run.training.folder.mkdir(parents=True)
store = MlflowRun(run.training.folder, Target.of(run))
store.start("once", None, 1000)
print("started", flush=True)
for step in range(1, steps):
    points = [Point(f"m{n}", float(step), step, 1000 + step) for n in range(20)]
    store.log(points)
store.end("FINISHED")
"""


def writer(runs_dir: Path, name: str, steps: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITES, str(runs_dir), name, str(steps)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_kill_in_the_middle_of_a_write_harms_nobody(tmp_path: Path) -> None:
    """A step's points are there as a whole, and others write as before."""
    run = config(tmp_path, training__name="other")
    with writer(tmp_path, "killed", 10**9) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        log = tmp_path / "mlflow.db-wal"
        before = log.stat().st_mtime_ns
        await_that(lambda: log.stat().st_mtime_ns != before, 60, "a write")
        os.kill(process.pid, signal.SIGKILL)
    run.training.folder.mkdir()
    store = MlflowRun(run.training.folder, Target.of(run))
    store.start("once", None, 1000)
    store.log([Point("train/loss", 4.0, 1, 1000)])
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        counted = "SELECT count(*) FROM metrics WHERE key LIKE 'm%' GROUP BY step"
        assert {count for (count,) in connection.execute(counted)} <= {20}


@pytest.mark.slow
def test_twenty_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    """They make the database, too."""
    writers = [writer(tmp_path, f"run{number}", 6) for number in range(20)]
    for process in writers:
        process.communicate(timeout=900)
    assert {process.returncode for process in writers} == {0}
    run = config(tmp_path)
    found = mlflow_runs(run)
    assert sorted(each.info.run_name for each in found) == sorted(f"run{n}" for n in range(20))
    for each in found:
        assert [step for step, _ in history(run, each.info.run_id, "m19")] == [1, 2, 3, 4, 5]


@pytest.mark.security
@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "another user's"])
def test_a_database_that_is_not_ours_is_not_written(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path / "runs")
    database = database_of(run.training.folder)
    target = tmp_path / "target"
    whole = database.read_bytes()
    if kind == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        database.unlink()
    if kind == "link":
        database.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(database)
    elif kind == "folder":
        database.mkdir()
    run.training.folder.mkdir()
    with pytest.raises(UserError, match=r"set training.runs_dir .*, or tracking.uri"):
        MlflowRun(run.training.folder, Target.of(run))
    assert why_foreign(database) is not None
    assert not target.exists()
    if kind == "another user's":
        assert database.read_bytes() == whole


@pytest.mark.security
def test_a_copy_of_another_user_s_database_has_plain_tables(tmp_path: Path) -> None:
    """A view would be a query without an end."""
    database, copy = tmp_path / "theirs.db", tmp_path / "copy.db"
    write_template(database)
    before = database.read_bytes()
    copy_foreign(database, copy)
    assert open_client(sqlite_uri(copy)).search_experiments() == []
    assert database.read_bytes() == before
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE VIEW endless AS SELECT 1")
    with pytest.raises(UserError, match="endless is a view"):
        copy_foreign(database, tmp_path / "again.db")
    (tmp_path / "link.db").symlink_to(copy)
    with pytest.raises(UserError, match="cannot be read"):
        copy_foreign(tmp_path / "link.db", tmp_path / "linked.db")


def test_tables_of_an_earlier_mlflow_are_upgraded_after_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "mlflow.db"
    write_template(database)
    asked: list[list[str]] = []
    old = Exception("Detected out-of-date database schema (found version a")
    tries = iter([old, old, None])

    def opened(_database: Path) -> None:
        error = next(tries)
        if error is not None:
            raise error

    def ran(command: list[str], **_options: Any) -> Any:
        asked.append(command[1:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module, "_open", opened)
    monkeypatch.setattr(subprocess, "run", ran)
    prepare(database)
    assert asked == [["-P", "-m", "mlflow", "db", "upgrade", f"sqlite:///{database}"]]
    kept = tmp_path / "mlflow.db.before_upgrade"
    assert mode(kept) == 0o600
    with closing(sqlite3.connect(kept)) as connection:
        assert connection.execute("SELECT count(*) FROM experiments").fetchone() == (1,)
