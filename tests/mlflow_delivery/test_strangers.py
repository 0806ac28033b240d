"""Somebody else's run folder: nothing leaves it, and nothing is written or read outside of it."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint.identity import check_folder
from keel_megatron.config import UserError
from keel_megatron.mlflow_delivery import outbox_reader
from keel_megatron.mlflow_delivery.delivery import Delivery
from keel_megatron.mlflow_delivery.outbox_reader import OutboxReader
from keel_megatron.mlflow_delivery.presence import is_alive
from keel_megatron.mlflow_delivery.run_file import read_run_file, take_run_file
from keel_megatron.mlflow_delivery.sync import add_file, sync
from keel_megatron.mlflow_delivery.target import Target, remembered_run_id
from keel_megatron.tracking.outbox import EventLog
from keel_megatron.tracking.run_log import RunLog
from tests.mlflow_delivery.session import Values
from tests.tracking.samples import config, history, mlflow_runs

pytestmark = pytest.mark.security


class Recorder:
    """A server that keeps what it is asked and knows nothing."""

    def __init__(self) -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def _record(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked.append(f"{self.command} {self.path}\n{self.headers}\n{body!r}")
                self.send_error(404)

            def log_message(self, *_arguments: Any) -> None:
                pass

        for method in ("GET", "POST", "PUT", "PATCH", "HEAD"):
            setattr(Handler, f"do_{method}", Handler._record)
        self.asked = asked
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """One, and a user with credentials."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "victim")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recorder = Recorder()
    yield recorder
    recorder.server.shutdown()
    recorder.server.server_close()
    recorder.thread.join()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The user's own folder, with what nobody else should have."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "id_rsa").write_text("the key")
    (home / ".bashrc").write_text("mine")
    return home


def crafted(tmp_path: Path, uri: str | None, *files: str) -> tuple[Any, Path]:
    """A run whose outbox names an address and files, of a run that has ended."""
    run = config(tmp_path / "runs")
    folder = run.training.folder
    folder.mkdir(parents=True)
    target = Target.of(run).to_json() | {"uri": uri, "artifacts": (tmp_path / "home").as_uri()}
    start = {"time": 1000, "name": "a", "target": target, "host": "x", "pid": 1, "born": 0.0}
    log = RunLog(folder, None, start=start)
    log.write(Values(1, {"loss": 5.0}))
    for file in files:
        log.event("artifact", path=file, time=1002)
    log.event("end", status="FINISHED", time=1003)
    log.close()
    return run, folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.iterdir())}


def test_no_address_of_a_folder_is_asked_before_the_user_confirms_it(
    tmp_path: Path, home: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run, folder = crafted(tmp_path, recorder.uri, str(home / "id_rsa"))
    command = f"keel track sync {folder} --to {recorder.uri}"
    for to in ([], ["http://127.0.0.1:1"]):
        with pytest.raises(UserError, match=f"reports to {recorder.uri}.*: {command}"):
            sync(folder, to)
    (folder / "samples.txt").write_text("a sample")
    add_file(folder, folder / "samples.txt", None)
    worker = Delivery(folder, [].append)
    assert not worker.deliver()
    assert recorder.asked == []
    with pytest.raises(UserError, match="not delivered yet, kept in"):
        sync(folder, [recorder.uri + "/"])
    confirmed = len(recorder.asked)
    assert "Authorization: Basic " in recorder.asked[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", recorder.uri)
    with pytest.raises(UserError, match="not delivered yet, kept in"):
        sync(folder)
    assert len(recorder.asked) > confirmed
    assert not any("the key" in asked or asked.startswith("PUT") for asked in recorder.asked)


def test_a_resume_asks_no_address_but_its_own_and_takes_no_file_from_outside(
    tmp_path: Path, home: Path, recorder: Recorder
) -> None:
    """tracking.uri is null today: what waits for the folder's address goes to the run's store."""
    run, folder = crafted(
        tmp_path, recorder.uri, str(home / "id_rsa"), "../../home/.bashrc", "..", "inner", "good"
    )
    (folder / "good").write_text("good")
    (folder / "inner").mkdir()
    (folder / "inner" / "link").symlink_to(home)
    (folder / "log.txt").symlink_to(home / "id_rsa")
    start = {"time": 2000, "name": "b", "target": Target.of(run).to_json(), "back_to": 1}
    RunLog(folder, 1, start=start)
    said: list[str] = []
    worker = Delivery(folder, said.append)
    assert worker.deliver(), worker.problem
    assert recorder.asked == []
    (found,) = mlflow_runs(run)
    assert history(run, found.info.run_id, "train/loss") == [(1, 5.0)]
    kept = folder / "mlflow_artifacts" / found.info.run_id / "artifacts"
    assert contents(kept) == {"good": b"good"}
    assert said[0] == (
        f"MLflow ({recorder.uri}) is an address that the run's folder names, and not today's "
        f"tracking.uri; what waits for it goes to sqlite:///{folder.parent}/mlflow.db, where the "
        "run reports now"
    )
    outside = [str(home / "id_rsa"), "../../home/.bashrc", "..", "inner", "log.txt"]
    assert said[1:] == [
        f"the file {name} is not in {folder}, the run's folder: it is skipped" for name in outside
    ]


def test_a_database_does_not_say_where_files_go(tmp_path: Path, home: Path) -> None:
    """Not even if it takes back what is written to it."""
    run, folder = crafted(tmp_path, None, ".bashrc")
    (folder / ".bashrc").write_text("theirs")
    sync(folder)
    (found,) = mlflow_runs(run)
    with closing(sqlite3.connect(folder.parent / "mlflow.db")) as database, database:
        database.execute("UPDATE runs SET artifact_uri = ?", (home.as_uri(),))
        database.execute(
            "CREATE TRIGGER keep AFTER UPDATE ON runs BEGIN "
            f"UPDATE runs SET artifact_uri = '{home.as_uri()}'; END"
        )
    before = contents(home)
    kept = folder / "mlflow_artifacts" / found.info.run_id / "artifacts" / ".bashrc"
    kept.unlink()
    add_file(folder, folder / ".bashrc", None)
    assert contents(home) == before
    assert kept.read_text() == "theirs"


@pytest.mark.parametrize(
    "name",
    ["log.txt", "mlflow_artifacts", "mlflow.db", "outbox", "checkpoints", "outbox/x"],
)
def test_a_link_that_leads_out_of_a_folder_is_refused(
    tmp_path: Path, home: Path, name: str
) -> None:
    """Also one to something that is not there: it would be made."""
    run, folder = crafted(tmp_path, None)
    if name == "outbox":
        (folder / "outbox").rename(home / "outbox")
    to = home / "outbox" if name == "outbox" else home / "id_rsa.new"
    (folder / name).symlink_to(to)
    before = sorted(home.rglob("*"))
    for refused in (lambda: sync(folder), lambda: check_folder(run)):
        with pytest.raises(UserError, match=f"{name} links to {to}, outside the run's"):
            refused()
    assert sorted(home.rglob("*")) == before


def test_a_link_within_a_folder_and_one_to_it_are_fine(tmp_path: Path) -> None:
    run, folder = crafted(tmp_path, None)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    (folder / "logs").mkdir()
    (folder / "log.txt").symlink_to("logs/log.txt")
    check_folder(run)


def test_a_folder_s_own_names_make_no_paths(tmp_path: Path, home: Path) -> None:
    """The id of a run and of its MLflow run become folders' names."""
    for bad in ("../../home", str(home), "", "a/b", "a\nb"):
        (tmp_path / "mlflow_run_id").write_text(bad)
        assert remembered_run_id(tmp_path) is None
        (tmp_path / "run.json").write_text(json.dumps({"id": bad, "place": str(home)}))
        assert read_run_file(tmp_path) is None
    original, copy = tmp_path / "original", tmp_path / "copy"
    for folder in (original, copy):
        (folder / "mlflow_artifacts").mkdir(parents=True)
        identity = {"id": str(home / "new"), "place": str(original)}
        (folder / "run.json").write_text(json.dumps(identity))
    take_run_file(copy)
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    "target", [[], {"uri": "x"}, {"params": [], "name": "a", "experiment": "b"}, "text"]
)
def test_a_target_that_is_none_is_no_report(tmp_path: Path, target: Any) -> None:
    _run, folder = crafted(tmp_path, None)
    (folder / "config.yaml").write_text("")
    EventLog(folder).append("start", time=9, name="b", target=target, metrics=0)
    assert sync(folder) == [f"{folder}: nothing to deliver; the run does not report to MLflow"]


def test_a_place_that_is_no_folder_is_not_waited_for(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.mkfifo(elsewhere / "run.json")
    assert read_run_file(elsewhere) is None


def test_a_server_that_is_down_does_not_have_the_outbox_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run, folder = crafted(tmp_path, "http://127.0.0.1:9")
    worker = Delivery(folder, [].append)
    read = []
    whole = outbox_reader._lines

    def counted(*arguments: Any) -> Iterator[Any]:
        for line in whole(*arguments):
            read.append(line)
            yield line

    monkeypatch.setattr(outbox_reader, "_lines", counted)
    assert not worker.deliver()
    assert not read, "the start that it tries was read before, and nothing counts without it"


@pytest.mark.parametrize(
    "session",
    [
        {},
        {"pid": "1", "born": 0.0},
        {"pid": 1, "born": "now"},
        {"pid": -1, "born": 0.0},
        {"pid": 10**30, "born": 0.0},
    ],
)
def test_a_process_that_is_none_does_not_run(tmp_path: Path, session: dict[str, Any]) -> None:
    assert not is_alive({"host": socket.gethostname(), **session}, tmp_path)


def test_a_note_follows_no_link(tmp_path: Path, home: Path) -> None:
    run, before = tmp_path / "run", contents(home)
    EventLog(run).append("tags", tags={})
    for name in ("delivered.json", "delivered.json.partial"):
        (run / "outbox" / name).symlink_to(home / ".bashrc")
    OutboxReader(run).close()
    assert contents(home) == before
