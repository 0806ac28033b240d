"""Delivery: what MLflow gets, when it does not answer, and after a death."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST

from keel_megatron.config import UserError
from keel_megatron.dashboard.shown import fill
from keel_megatron.mlflow_delivery import worker as worker_module
from keel_megatron.mlflow_delivery.delivery import Delivery
from keel_megatron.mlflow_delivery.mlflow_run import MlflowRun
from keel_megatron.mlflow_delivery.outbox_reader import Waiting
from keel_megatron.mlflow_delivery.presence import the_only_one
from keel_megatron.mlflow_delivery.sync import add_file, sync
from keel_megatron.mlflow_delivery.target import Target, remembered_run_id
from keel_megatron.mlflow_delivery.worker import DELIVERED, LEFT, follow
from tests.mlflow_delivery.session import EarlierSession, Session, deliver
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs


def test_a_resumed_run_goes_on_in_the_same_run(tmp_path: Path) -> None:
    """Points that were delivered before they became void stay, and a tag says so."""
    run = config(tmp_path)
    first = Session(run, "a")
    started = first.time
    first.losses({1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0})
    measured = {"system/x/cpu_utilization_percentage": 7.0}
    line = json.dumps({"kind": "system", "time": first.time + 90_000, "values": measured})
    (first.folder / "outbox" / "system-x.1.jsonl").write_text(line + "\n")
    deliver(first.folder)
    second = Session(run, "b", back_to=2)
    deliver(first.folder)
    (found,) = mlflow_runs(run)
    run_id = found.info.run_id
    second.losses({3: 3.5, 4: 2.5})
    second.rewind(3)
    second.losses({4: 2.25})
    second.put("end", status="FINISHED")
    deliver(first.folder)
    points = sorted(history(run, run_id, "train/loss"))
    assert points == [(1, 5.0), (2, 4.0), (3, 3.0), (3, 3.5), (4, 2.0), (4, 2.25)]
    (found,) = mlflow_runs(run)
    assert found.info.status == "FINISHED"
    assert found.data.tags["resumed.1"].startswith("from step 2, 2023-11-14T22:")
    assert found.data.tags["resumed.2"].startswith("from step 3, 2023-11-14T22:")
    assert found.data.metrics["train/loss"] == 2.25, "of two points of a step the later counts"
    # Seconds since the run began: not a training step.
    assert history(run, run_id, "system/x/cpu_utilization_percentage") == [(90, 7.0)]
    assert found.info.start_time == started


def test_an_undelivered_beginning_makes_its_run_when_it_can(tmp_path: Path) -> None:
    """Two starts anew and a restart before the server was ever up: two runs, in order.

    The second start has dropped the first one's records.
    """
    run = config(tmp_path)
    Session(run, "a").losses({1: 9.0})
    Session(run, "b").losses({1: 5.0, 2: 4.0, 3: 3.0})
    last = Session(run, "c", back_to=2)
    last.losses({3: 3.5})
    deliver(last.folder)
    old, new = mlflow_runs(run)
    assert (old.info.status, new.info.status) == ("FAILED", "RUNNING")
    assert history(run, old.info.run_id, "train/loss") == []
    assert history(run, new.info.run_id, "train/loss") == [(1, 5.0), (2, 4.0), (3, 3.5)]
    assert remembered_run_id(last.folder) == new.info.run_id


def test_a_delivery_that_is_repeated_changes_nothing(tmp_path: Path) -> None:
    """A worker that is killed before its note: everything comes a second time."""
    run = config(tmp_path)
    session = Session(run, "a")
    session.losses({1: 5.0, 2: float("nan"), 3: 3.0})
    session.rewind(2)
    session.losses({3: 3.5})
    deliver(session.folder)
    before = history(run, mlflow_runs(run)[0].info.run_id, "train/loss")
    (session.folder / "outbox" / "delivered.json").unlink()
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
    worker = Delivery(session.folder, said.append)
    whole = MlflowRun.log

    def no_answer(self: MlflowRun, points: Any) -> None:
        raise MlflowException("http://me:secret@host refused")

    monkeypatch.setattr(MlflowRun, "log", no_answer)
    assert not worker.deliver()
    assert not worker.deliver()
    assert len(said) == 1
    assert said[0].endswith(f"and {session.folder} keeps everything until it does")
    assert "secret" not in said[0]
    assert str(Waiting.of(session.folder)) == "1 point(s)"
    session.losses({2: 4.0})
    monkeypatch.setattr(MlflowRun, "log", whole)
    assert worker.deliver()
    assert said[1].endswith("answers again: what waited is being delivered")
    assert history(run, mlflow_runs(run)[0].info.run_id, "train/loss") == [(1, 5.0), (2, 4.0)]
    assert (len(said), worker.points) == (2, 2)


def test_what_mlflow_refuses_is_said_and_holds_up_nothing(tmp_path: Path) -> None:
    run, said = config(tmp_path), []
    session = Session(run, "a")
    session.record(1, **{"a?": 1.0})
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
    worker = Delivery(session.folder, said.append, file_seconds=0.2)
    deadline = time.monotonic() + 300
    tries = 1
    while not worker.deliver():
        tries += 1
        assert time.monotonic() < deadline
    assert (tries > 1) == isinstance(error, PermissionError)
    (found,) = mlflow_runs(run)
    assert (found.info.status, found.data.metrics) == ("KILLED", {"train/loss": 5.0})
    left_out = [line for line in said if line.endswith("it is skipped")]
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
    assert not Delivery(session.folder, [].append).deliver()
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
    worker = deliver(session.folder, said)
    gone = mlflow_runs(run)[0].info.run_id
    mlflow_client(run).delete_run(gone)
    session.losses({2: 4.0, 3: 3.0})
    session.put("end", status="FINISHED")
    assert worker.deliver()
    assert said == [f"MLflow has no run {gone} any longer: a new one is made"]
    (found,) = mlflow_runs(run)
    assert (found.info.status, found.data.params["training.steps"]) == ("FINISHED", "4")
    assert history(run, found.info.run_id, "train/loss") == [(2, 4.0), (3, 3.0)]


def test_every_start_s_points_go_to_the_place_that_it_named(tmp_path: Path) -> None:
    """Whoever delivers them: the first start's come after the second start, by another worker."""
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
    first = EarlierSession(there, "a")
    first.losses({1: 5.0})
    if delivered:
        deliver(first.folder, to=there.tracking.uri)
        first.number += 1  # its file is gone
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
    assert runs == [[], [(1, 5.0), (2, 4.0)]], "the second start has dropped the first one's"


def test_sync_delivers_and_tells_the_end_of_a_process_that_is_gone(tmp_path: Path) -> None:
    run = config(tmp_path)
    with pytest.raises(UserError, match="contains no run"):
        sync(tmp_path)
    session = Session(run, "a", pid=os.getpid())  # lives, but was born at another time
    session.losses({1: 5.0})
    (session.folder / "log.txt").write_text("the end")
    with the_only_one(session.folder, wait=False) as held:
        assert held
        with pytest.raises(UserError, match="the run is training and delivers its own reports"):
            sync(session.folder)
    lines = sync(session.folder)
    assert lines[0].startswith(f"{session.folder}: delivered 1 point(s) to MLflow (sqlite")
    assert lines[1].startswith(f"{session.folder}: its status is FAILED now: process")
    (found,) = mlflow_runs(run)
    assert found.info.status == "FAILED"
    assert [f.path for f in mlflow_client(run).list_artifacts(found.info.run_id)] == ["log.txt"]
    (line,) = sync(session.folder)
    assert "nothing to deliver; MLflow" in line


def test_sync_with_a_server_that_is_down_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = config(tmp_path, tracking__uri="http://127.0.0.1:9")
    session = Session(run, "a")
    session.losses({1: 5.0})
    with pytest.raises(
        UserError, match=r"does not answer: .*1 point\(s\) not delivered yet, kept in"
    ):
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


def test_on_a_network_file_system_the_database_is_filled_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several machines must not write one SQLite file; nobody holds the run's lock meanwhile."""
    monkeypatch.setattr(worker_module, "network_filesystem", lambda _path: "nfs4")
    run, said = config(tmp_path), []
    session = Session(run, "a")
    session.losses({1: 5.0})
    session.put("end", status="FINISHED")
    before = (tmp_path / "mlflow.db").read_bytes()
    assert follow(session.folder, os.getppid(), "a", said.append) == LEFT
    assert said == [
        f"{tmp_path} is on a network file system (nfs4): `keel dashboard` and `keel track "
        "sync` update MLflow's database there"
    ]
    assert (tmp_path / "mlflow.db").read_bytes() == before
    assert (session.folder / "outbox" / "alive").exists()
    fill([session.folder], said.append)
    (found,) = mlflow_runs(run)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"train/loss": 5.0})


def test_on_a_network_file_system_tracking_uri_is_reported_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "network_filesystem", lambda _path: "nfs4")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run, said = config(tmp_path, tracking__uri=uri), []
    session = Session(run, "a")
    session.losses({1: 5.0})
    session.put("end", status="FINISHED")
    assert follow(session.folder, os.getppid(), "a", said.append, [uri]) == DELIVERED
    assert said == []
    assert mlflow_runs(run)[0].data.metrics == {"train/loss": 5.0}
