"""The courier: what MLflow gets from a spool, when it does not answer, and after a death."""

from __future__ import annotations

import itertools
import json
import os
import socket
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from keel_megatron.config import UserError
from keel_megatron.tracking.changes import Change
from keel_megatron.tracking.courier import Courier
from keel_megatron.tracking.mlflow_run import MlflowRun
from keel_megatron.tracking.presence import the_only_one
from keel_megatron.tracking.spool import EVENTS, FOLDER, SpoolWriter, Waiting
from keel_megatron.tracking.sync import add_file, sync
from keel_megatron.tracking.target import Target, remembered_run_id
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs


class Session:
    """What a training process leaves in a run's spool; a second apart each."""

    clock = itertools.count(1_700_000_000_000, 1000)

    def __init__(
        self, run: Any, name: str, back_to: int | None = None, pid: int = 0, earlier: bool = False
    ) -> None:
        self.run = run
        self.folder: Path = run.training.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writer = SpoolWriter(self.folder, EVENTS)
        extra: dict[str, Any] = {} if back_to is None else {"back_to": back_to}
        if earlier:  # as versions did whose starts did not name their place
            kept = json.dumps(Target.of(run).to_json())
            (self.folder / FOLDER / "target.json").write_text(kept)
        else:
            extra["target"] = Target.of(run).to_json()
        place = {"host": socket.gethostname(), "pid": pid, "born": 0.0}
        self.put("start", name=name, **place, **extra)

    def put(self, kind: str, **values: Any) -> None:
        self.time = next(self.clock)
        self.writer.append(kind, time=self.time, **values)

    def losses(self, losses: dict[int, float]) -> None:
        for step, loss in losses.items():
            self.put("metrics", step=step, values={"loss": loss})


def deliver(folder: Path, said: list[str] | None = None, to: str | None = None) -> Courier:
    confirmed = [] if to is None else [to]
    courier = Courier(folder, [].append if said is None else said.append, confirmed=confirmed)
    assert courier.deliver(), courier.problem
    return courier


def test_a_resumed_run_goes_on_in_the_same_run_without_doubled_points(tmp_path: Path) -> None:
    """The points after the resumed step were delivered before; sqlite gives them back."""
    run = config(tmp_path)
    first = Session(run, "a")
    started = first.time
    first.losses({1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0})
    SpoolWriter(first.folder, "system-x").append(
        "system", time=first.time + 90_000, values={"system/x/cpu_utilization_percentage": 7.0}
    )
    deliver(first.folder)
    second = Session(run, "b", back_to=2)
    deliver(first.folder)
    (found,) = mlflow_runs(run)
    run_id = found.info.run_id
    assert found.data.metrics["train/loss"] == 4.0, "the last value that counts"
    second.losses({3: 3.5, 4: 2.5})
    second.put("rewind", back_to=3)
    second.losses({4: 2.25})
    second.put("end", status="FINISHED")
    deliver(first.folder)
    assert history(run, run_id, "train/loss") == [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.25)]
    (found,) = mlflow_runs(run)
    assert found.info.status == "FINISHED"
    assert found.data.tags["resumed.1"].startswith("from step 2, 2023-11-14T22:")
    assert found.data.tags["resumed.2"].startswith("from step 3, 2023-11-14T22:")
    # Seconds since the run began: not a training step, so never taken back.
    assert history(run, run_id, "system/x/cpu_utilization_percentage") == [(94, 7.0)]
    assert found.info.start_time == started


def test_an_undelivered_beginning_makes_its_run_when_it_can(tmp_path: Path) -> None:
    """Two starts anew and a restart before the server was ever up: two runs, in order."""
    run = config(tmp_path)
    Session(run, "a").losses({1: 9.0})
    Session(run, "b").losses({1: 5.0, 2: 4.0, 3: 3.0})
    last = Session(run, "c", back_to=2)
    last.losses({3: 3.5})
    deliver(last.folder)
    old, new = mlflow_runs(run)
    assert (old.info.status, new.info.status) == ("FAILED", "RUNNING")
    assert history(run, old.info.run_id, "train/loss") == [(1, 9.0)]
    assert history(run, new.info.run_id, "train/loss") == [(1, 5.0), (2, 4.0), (3, 3.5)]
    assert remembered_run_id(last.folder) == new.info.run_id


def test_a_delivery_that_is_repeated_changes_nothing(tmp_path: Path) -> None:
    """A courier that is killed before its note: everything comes a second time."""
    run = config(tmp_path)
    session = Session(run, "a")
    session.losses({1: 5.0, 2: float("nan"), 3: 3.0})
    session.put("rewind", back_to=2)
    session.losses({3: 3.5})
    deliver(session.folder)
    before = history(run, mlflow_runs(run)[0].info.run_id, "train/loss")
    (session.folder / "spool" / "delivered.json").unlink()
    deliver(session.folder)
    (found,) = mlflow_runs(run)
    assert str(history(run, found.info.run_id, "train/loss")) == str(before)
    assert [step for step, _ in before] == [1, 2, 3]
    assert "resumed.2" not in found.data.tags


def test_a_server_that_is_down_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = config(tmp_path), []
    session = Session(run, "a")
    session.losses({1: 5.0})
    courier = Courier(session.folder, said.append)
    whole = MlflowRun.log

    def no_answer(self: MlflowRun, points: Any) -> None:
        raise MlflowException("http://me:secret@host refused")

    monkeypatch.setattr(MlflowRun, "log", no_answer)
    assert not courier.deliver()
    assert not courier.deliver()
    assert len(said) == 1
    assert said[0].endswith(f"and what it reports waits in {session.folder / 'spool'}")
    assert "secret" not in said[0]
    assert str(Waiting.of(session.folder)) == "1 point(s)"
    session.losses({2: 4.0})
    monkeypatch.setattr(MlflowRun, "log", whole)
    assert courier.deliver()
    assert said[1].endswith("answers again: what waited is being delivered")
    assert history(run, mlflow_runs(run)[0].info.run_id, "train/loss") == [(1, 5.0), (2, 4.0)]
    assert (len(said), courier.points) == (2, 2)


def test_what_mlflow_refuses_is_said_and_holds_up_nothing(tmp_path: Path) -> None:
    run, said = config(tmp_path), []
    session = Session(run, "a")
    session.put("metrics", step=1, values={"a?": 1.0})
    session.losses({1: 5.0})
    session.put("artifact", path="nowhere.txt")
    session.put("end", status="KILLED")
    deliver(session.folder, said)
    (found,) = mlflow_runs(run)
    assert (found.info.status, found.data.metrics) == ("KILLED", {"train/loss": 5.0})
    assert len(said) == 2
    assert "refuses metrics of step 1" in said[0]
    assert "refuses the file nowhere.txt" in said[1]


@pytest.mark.parametrize("error", [ModuleNotFoundError("boto3"), PermissionError("no key")])
def test_a_store_of_files_that_fails_holds_up_no_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The file is tried again for a while, or not if its store's package is missing."""

    def refuse(self: MlflowRun, path: Path) -> None:
        raise error

    monkeypatch.setattr(MlflowRun, "log_file", refuse)
    run, said = config(tmp_path), []
    session = Session(run, "a")
    for name in ("one.txt", "log.txt"):
        (session.folder / name).write_text(name)
    os.utime(session.folder / "log.txt", (session.time / 1000, session.time / 1000))
    session.put("artifact", path="one.txt")
    session.losses({1: 5.0})
    session.put("end", status="KILLED")
    courier = Courier(session.folder, said.append, file_seconds=0.2)
    deadline = time.monotonic() + 300
    tries = 1
    while not courier.deliver():
        tries += 1
        assert time.monotonic() < deadline
    assert (tries > 1) == isinstance(error, PermissionError)
    (found,) = mlflow_runs(run)
    assert (found.info.status, found.data.metrics) == ("KILLED", {"train/loss": 5.0})
    left_out = [line for line in said if line.endswith("it is left out")]
    assert ["one.txt" in left_out[0], "log.txt" in left_out[1]] == [True, True]


def test_what_a_proxy_answers_is_no_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTP's 400 without MLflow's JSON, such as a proxy's that asks for TLS."""

    def answer(self: MlflowRun, points: Any) -> None:
        raise MlflowException("<html>400</html>", error_code=BAD_REQUEST)

    session = Session(config(tmp_path), "a")
    session.losses({1: 5.0})
    monkeypatch.setattr(MlflowRun, "log", answer)
    assert not Courier(session.folder, [].append).deliver()
    assert Waiting.of(session.folder).points == 1


@pytest.mark.parametrize("how", ["unknown", "deleted"])
def test_a_run_that_is_gone_is_replaced_and_said(tmp_path: Path, how: str) -> None:
    run, said = config(tmp_path), []
    gone = "0" * 32
    session = Session(run, "a")
    deliver(session.folder)
    if how == "deleted":
        gone = mlflow_runs(run)[0].info.run_id
        mlflow_client(run).delete_run(gone)
    (session.folder / "mlflow_run_id").write_text(gone)
    Session(run, "b", back_to=1)
    deliver(session.folder, said)
    assert said == [f"MLflow has no run {gone} any longer: a new one is made"]
    assert remembered_run_id(session.folder) == mlflow_runs(run)[-1].info.run_id != gone


def test_a_run_that_is_deleted_while_it_trains_is_replaced_once(tmp_path: Path) -> None:
    run, said = config(tmp_path), []
    session = Session(run, "a")
    session.losses({1: 5.0})
    courier = deliver(session.folder, said)
    gone = mlflow_runs(run)[0].info.run_id
    mlflow_client(run).delete_run(gone)
    session.losses({2: 4.0, 3: 3.0})
    session.put("end", status="FINISHED")
    assert courier.deliver()
    assert said == [f"MLflow has no run {gone} any longer: a new one is made"]
    (found,) = mlflow_runs(run)
    assert (found.info.status, found.data.params["training.steps"]) == ("FINISHED", "4")
    assert history(run, found.info.run_id, "train/loss") == [(2, 4.0), (3, 3.0)]


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
    monkeypatch.setattr("keel_megatron.tracking.mlflow_run.sqlite_file", lambda uri: None)
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
    session.put("metrics", step=1, values={"loss": float("inf"), "grad_norm": float("-inf")})
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


def test_every_start_s_points_go_to_the_place_that_it_named(tmp_path: Path) -> None:
    """Whoever delivers them: the first start's come after the second start, by another courier."""
    here = config(tmp_path)
    there = config(tmp_path, tracking__uri=f"sqlite:///{tmp_path / 'there.db'}")
    first, said = Session(here, "a"), []
    deliver(first.folder)
    first.losses({1: 5.0})
    first.put("end", status="KILLED")
    second = Session(there, "b", back_to=1)
    second.losses({2: 4.0})
    deliver(first.folder, said, there.tracking.uri)
    (old,), (new,) = mlflow_runs(here), mlflow_runs(there)
    assert (old.info.status, new.info.status) == ("KILLED", "RUNNING")
    assert history(here, old.info.run_id, "train/loss") == [(1, 5.0)]
    assert history(there, new.info.run_id, "train/loss") == [(2, 4.0)]
    assert new.data.params["tracking.uri"] == there.tracking.uri
    assert said == [f"MLflow has no run {old.info.run_id} any longer: a new one is made"]


@pytest.mark.parametrize("delivered", [False, True])
def test_a_folder_of_an_earlier_version_goes_on(tmp_path: Path, delivered: bool) -> None:
    """Its starts named no place, neither those that wait nor the delivered one: a file did."""
    there = config(tmp_path, tracking__uri=f"sqlite:///{tmp_path / 'there.db'}")
    first = Session(there, "a", earlier=True)
    first.losses({1: 5.0})
    if delivered:
        deliver(first.folder, to=there.tracking.uri)
    first.losses({2: 4.0})
    assert f"MLflow ({there.tracking.uri})" in sync(first.folder, [there.tracking.uri])[0]
    here = config(tmp_path)
    Session(here, "b", back_to=2).losses({3: 3.0})
    deliver(first.folder, to=there.tracking.uri)
    (old,), (new,) = mlflow_runs(there), mlflow_runs(here)
    assert history(there, old.info.run_id, "train/loss") == [(1, 5.0), (2, 4.0)]
    assert history(here, new.info.run_id, "train/loss") == [(3, 3.0)]
    assert Target.of_start(tmp_path, {"name": "a"}) is None, "nobody kept it: its disk was full"


def test_a_place_that_is_gone_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server has another address now: what waited for the old one is not lost."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = "http://me:secret@127.0.0.1:9"
    gone = config(tmp_path, tracking__uri=uri)
    here, said = config(tmp_path), []
    for name in ("a", "b"):  # two starts that it never heard of
        session = Session(gone, name)
        session.losses({1: 5.0})
    Session(here, "c", back_to=1).losses({2: 4.0})
    deliver(session.folder, said, uri)
    assert len(said) == 1
    assert said[0].startswith("MLflow (http://***@127.0.0.1:9) does not answer: ")
    assert "what waits for it goes to sqlite:///" in said[0]
    runs = [history(here, found.info.run_id, "train/loss") for found in mlflow_runs(here)]
    assert runs == [[(1, 5.0)], [(1, 5.0), (2, 4.0)]]


def test_a_server_keeps_the_points_and_is_told_that_they_are_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keel_megatron.tracking.mlflow_run.sqlite_file", lambda uri: None)
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
    assert not Courier(session.folder, [].append).deliver()
    assert not (session.folder / "mlflow.db").exists()
    (partial,) = session.folder.glob("mlflow.db.*.partial")
    with closing(sqlite3.connect(partial)) as database:
        database.execute("DROP TABLE IF EXISTS alembic_version")
        database.commit()
    monkeypatch.setattr(MlflowClient, "search_experiments", whole)
    deliver(session.folder)
    assert not partial.exists()
    assert history(run, mlflow_runs(run)[0].info.run_id, "train/loss") == [(1, 5.0)]


def test_sync_delivers_and_tells_the_end_of_a_process_that_is_gone(tmp_path: Path) -> None:
    run = config(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        sync(tmp_path)
    session = Session(run, "a", pid=os.getpid())  # lives, but was born at another time
    session.losses({1: 5.0})
    (session.folder / "log.txt").write_text("the end")
    with the_only_one(session.folder, wait=False) as held:
        assert held
        with pytest.raises(UserError, match="the run is at work and delivers what waits itself"):
            sync(session.folder)
    lines = sync(session.folder)
    assert lines[0].startswith(f"{session.folder}: delivered 1 point(s) to MLflow (sqlite")
    assert lines[1].startswith(f"{session.folder}: its status is FAILED now: process")
    (found,) = mlflow_runs(run)
    assert found.info.status == "FAILED"
    assert [f.path for f in mlflow_client(run).list_artifacts(found.info.run_id)] == ["log.txt"]
    (line,) = sync(session.folder)
    assert "nothing waits, MLflow" in line


def test_sync_with_a_server_that_is_down_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = config(tmp_path, tracking__uri="http://127.0.0.1:9")
    session = Session(run, "a")
    session.losses({1: 5.0})
    with pytest.raises(UserError, match=r"does not answer: .*1 point\(s\) still wait in"):
        sync(session.folder, ["http://127.0.0.1:9"])


def test_a_file_of_a_run_that_has_ended_is_delivered(tmp_path: Path) -> None:
    run = config(tmp_path)
    session = Session(run, "a")
    session.put("end", status="FINISHED")
    deliver(session.folder)
    (session.folder / "samples.txt").write_text("def f():")
    add_file(session.folder, session.folder / "samples.txt", None)
    (found,) = mlflow_runs(run)
    assert found.info.status == "FINISHED"
    names = [file.path for file in mlflow_client(run).list_artifacts(found.info.run_id)]
    assert names == ["samples.txt"]
