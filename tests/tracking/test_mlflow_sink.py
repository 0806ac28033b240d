"""The sink: what MLflow gets, and what happens when it does not answer."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.tracking.mlflow_run import (
    MlflowRun,
    flat_params,
    remembered_run_id,
    without_credentials,
)
from keel_megatron.tracking.mlflow_sink import MlflowSink
from keel_megatron.tracking.records import ValidationRecord
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs, record


def open_sink(run: Any, said: list[str], run_id: str | None = None, **options: Any) -> MlflowSink:
    run.training.folder.mkdir(parents=True, exist_ok=True)
    return MlflowSink(run, said.append, run_id, **options)


def test_params_metrics_by_step_tags_files_and_status(tmp_path: Path) -> None:
    run = config(tmp_path, data__text=[f"{'x' * 90}/{number}" for number in range(100)])
    said: list[str] = []
    sink = open_sink(run, said)
    for step in range(1, 301):  # 2,700 values: several calls
        sink.record(record(step, loss=1.0 / step))
    sink.record(ValidationRecord(300, 0.25, 4800, 153600))
    note = run.training.folder / "note.txt"
    note.write_text("kept")
    sink.artifact(note)
    sink.finish("FINISHED")
    # On a busy machine it may tell that it waits, and nothing else.
    assert [line for line in said if not line.startswith("waiting up to")] == []
    (found,) = mlflow_runs(run)
    assert found.info.run_id == sink.run_id == remembered_run_id(run.training.folder)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "test")
    assert found.data.tags["version.megatron-core"] == "0.16.1"
    assert found.data.params["model.blocks"] == "8"
    text = found.data.params["data.text"]
    assert len(text) == 6000
    assert text.endswith("...")
    assert len(found.data.params) == sum(len(v) for v in run.model_dump().values())
    assert history(run, found.info.run_id, "loss") == [(n, 1.0 / n) for n in range(1, 301)]
    assert history(run, found.info.run_id, "validation_loss") == [(300, 0.25)]
    assert "step" not in found.data.metrics
    (file,) = mlflow_client(run).list_artifacts(found.info.run_id)
    assert file.path == "note.txt"
    kept = run.training.folder / "mlflow_artifacts" / found.info.run_id / "artifacts" / "note.txt"
    assert kept.read_text() == "kept"


def test_a_run_id_goes_on_in_the_same_run_and_tells_what_changed(tmp_path: Path) -> None:
    run, said = config(tmp_path), []
    first = open_sink(run, said)
    first.record(record(1))
    first.finish("KILLED")
    longer = config(tmp_path, training__steps=8)
    second = open_sink(longer, said, first.run_id)
    assert second.opened.wait(20)
    (found,) = mlflow_runs(run)
    assert found.info.status == "RUNNING"
    second.record(record(2))
    second.finish("FINISHED")
    (found,) = mlflow_runs(run)
    assert second.run_id == first.run_id == found.info.run_id
    assert found.info.status == "FINISHED"
    assert [step for step, _ in history(run, found.info.run_id, "loss")] == [1, 2]
    assert found.data.params["training.steps"] == "4"
    assert found.data.tags["changed.training.steps"] == "8"
    assert said == []


@pytest.mark.parametrize("how", ["unknown", "deleted"])
def test_a_run_that_is_gone_is_replaced_and_said(tmp_path: Path, how: str) -> None:
    run, said = config(tmp_path), []
    gone = "0" * 32
    if how == "deleted":
        sink = open_sink(run, said)
        sink.finish("KILLED")
        gone = str(sink.run_id)
        mlflow_client(run).delete_run(gone)
    sink = open_sink(run, said, gone)
    sink.record(record(1))
    sink.finish("FINISHED")
    assert said == [f"MLflow has no run {gone} any longer: a new one is made"]
    assert [found.info.run_id for found in mlflow_runs(run)] == [sink.run_id]
    assert remembered_run_id(run.training.folder) == sink.run_id != gone


def test_a_new_start_ends_what_a_kill_left_running(tmp_path: Path) -> None:
    run, said = config(tmp_path), []
    run.training.folder.mkdir()
    MlflowRun(run, None)  # and no end
    sink = open_sink(run, said)
    sink.finish("FINISHED")
    assert [found.info.status for found in mlflow_runs(run)] == ["KILLED", "FINISHED"]


def test_a_stray_mlruns_folder_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlruns").mkdir()
    monkeypatch.chdir(tmp_path)
    database = tmp_path / "shared" / "all.db"
    database.parent.mkdir()
    runs = [
        config(tmp_path / "runs"),
        config(tmp_path / "others", tracking__uri=f"sqlite:///{database}"),
    ]
    for run in runs:
        sink = open_sink(run, [])
        note = run.training.folder / "note.txt"
        note.write_text("kept")
        sink.artifact(note)
        sink.finish("FINISHED")
        assert mlflow_runs(run)[0].info.status == "FINISHED"
    assert list((tmp_path / "mlruns").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"mlruns", "runs", "others", "shared"}
    assert (database.parent / "mlflow_artifacts").is_dir()


@pytest.mark.parametrize("retries", ["0", "7"])
def test_a_dead_server_blocks_nothing_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retries: str
) -> None:
    """With MLflow's own 7 retries the thread is still at the first call when the run ends."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", retries)
    run = config(tmp_path, tracking__uri="http://someone:secret@127.0.0.1:9")
    said: list[str] = []
    sink = open_sink(run, said, close_seconds=4.0)
    gc.collect()  # what other tests left would be collected now, for 0.3 s
    started = time.monotonic()
    for step in range(1000):
        sink.record(record(step))
    sink.artifact(tmp_path / "note.txt")
    assert time.monotonic() - started < 0.1
    if retries == "0":
        while not said and time.monotonic() - started < 20:
            time.sleep(0.05)
    closing = time.monotonic()
    sink.finish("FINISHED")
    assert time.monotonic() - closing < 5
    assert said[-1] == (
        "MLflow (http://***@127.0.0.1:9) did not get 1000 of 1000 records, 1 of 1 files, "
        "the status FINISHED; metrics.jsonl has every record"
    )
    assert len(said) == 2
    assert said[0].startswith(
        "MLflow (http://***@127.0.0.1:9) failed" if retries == "0" else "waiting up to 4 s"
    )
    assert "secret" not in "".join(said)
    if retries == "0":
        assert sink.failures > 1
    time.sleep(0.2)
    assert len(said) == 2, "nothing is said once the end was reported"


def test_a_file_that_vanished_does_not_take_the_metrics_with_it(tmp_path: Path) -> None:
    run = config(tmp_path)
    said: list[str] = []
    sink = open_sink(run, said)
    sink.artifact(tmp_path / "nowhere.txt")
    sink.record(record(1))
    sink.finish("FINISHED")
    (found,) = mlflow_runs(run)
    assert found.info.status == "FINISHED"
    assert history(run, found.info.run_id, "loss") == [(1, 1.0)]
    assert len(said) == 2
    assert "nowhere.txt" in said[0]
    assert "did not get 1 of 1 files; metrics" in said[1]


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    said: list[str] = []
    sink = open_sink(config(tmp_path), said)
    sink.record(record(1))
    sink.finish("FINISHED")
    assert "install mlflow-skinny, sqlalchemy and alembic, or set tracking.mlflow=false" in said[0]
    assert "did not get 1 of 1 records, the status FINISHED" in said[1]


QUIET = """
import sys, threading
from pathlib import Path
import keel_megatron.tracking.tracker
from keel_megatron.tracking.mlflow_sink import MlflowSink
from tests.settings import small_config
assert not {"torch", "mlflow", "matplotlib"} & sys.modules.keys()
run = small_config(training__runs_dir=sys.argv[1])
run.training.folder.mkdir(parents=True)
sink = MlflowSink(run, print)
sink.finish("FINISHED")
assert "mlflow" in sys.modules and sink.run_id
"""


def test_a_new_database_is_made_in_silence_and_nothing_heavy_is_imported_early(
    tmp_path: Path,
) -> None:
    environment = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pa@ss@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://me:p@db/runs", "postgresql+psycopg2://***@db/runs"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_credentials_are_not_shown(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_credentials_are_no_param(tmp_path: Path) -> None:
    run = config(tmp_path, tracking__uri="https://me:secret@host")
    assert flat_params(run)["tracking.uri"] == "https://***@host"
