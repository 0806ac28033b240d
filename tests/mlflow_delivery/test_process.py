"""The worker's process: what MLflow gets, and how long training waits for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from keel_megatron.mlflow_delivery.outbox_reader import Waiting
from keel_megatron.mlflow_delivery.process import WorkerProcess
from keel_megatron.mlflow_delivery.reporting import start_event
from keel_megatron.mlflow_delivery.target import flat_params, remembered_run_id, tracking_uri
from keel_megatron.tracking.records import ValidationRecord
from keel_megatron.tracking.run_log import RunLog
from tests.hosts import await_that
from tests.tracking.samples import config, history, mlflow_client, mlflow_runs, record


class Reports:
    """A run's log, and the process that follows it."""

    def __init__(self, run: Any, said: list[str], **options: Any) -> None:
        folder = run.training.folder
        start = start_event(run)
        self.log = RunLog(folder, None, start=start)
        self.process = WorkerProcess(
            folder, start["name"], tracking_uri(run), run.tracking.uri, said.append, **options
        )

    def finish(self, status: str = "FINISHED") -> None:
        self.log.event("end", status=status)
        self.process.finish()
        self.log.close()


def told(said: list[str]) -> list[str]:
    """Without the word that it waits, which a busy machine may need."""
    return [line for line in said if not line.startswith("waiting up to")]


def test_params_metrics_by_step_tags_files_and_status(tmp_path: Path) -> None:
    run = config(tmp_path, data__text=[f"{'x' * 90}/{number}" for number in range(100)])
    said: list[str] = []
    reports = Reports(run, said)
    for step in range(1, 301):  # 3,000 values: several calls
        reports.log.write(record(step, loss=1.0 / step))
    reports.log.write(ValidationRecord(300, 0.25, 4800, 153600))
    reports.log.event("tags", tags={"layout": "TP 1"})
    note = run.training.folder / "note.txt"
    note.write_text("kept")
    reports.log.event("artifact", path="note.txt")
    reports.finish()
    assert told(said) == []
    assert not Waiting.of(run.training.folder)
    (found,) = mlflow_runs(run)
    assert found.info.run_id == remembered_run_id(run.training.folder)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "test")
    assert found.data.tags["layout"] == "TP 1"
    assert found.data.params["model.blocks"] == "8"
    text = found.data.params["data.text"]
    assert len(text) == 6000
    assert text.endswith("...")
    assert len(found.data.params) == sum(len(v) for v in run.model_dump().values())
    assert history(run, found.info.run_id, "train/loss") == [(n, 1.0 / n) for n in range(1, 301)]
    assert history(run, found.info.run_id, "validation/loss") == [(300, 0.25)]
    # The user interface can draw any metric over any other of the same steps.
    tokens = history(run, found.info.run_id, "workload/consumed_tokens")
    assert tokens[-1] == (300, 153600.0)
    assert "step" not in found.data.metrics
    (file,) = mlflow_client(run).list_artifacts(found.info.run_id)
    assert file.path == "note.txt"
    kept = run.training.folder / "mlflow_artifacts" / found.info.run_id / "artifacts" / "note.txt"
    assert kept.read_text() == "kept"


def test_a_stray_mlruns_folder_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlruns").mkdir()
    monkeypatch.chdir(tmp_path)
    database = tmp_path / "shared" / "all.db"
    database.parent.mkdir()
    run = config(tmp_path / "runs", tracking__uri=f"sqlite:///{database}")
    reports = Reports(run, [])
    note = run.training.folder / "note.txt"
    note.write_text("kept")
    reports.log.event("artifact", path="note.txt")
    reports.finish()
    assert mlflow_runs(run)[0].info.status == "FINISHED"
    assert list((tmp_path / "mlruns").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"mlruns", "runs", "shared"}
    assert (database.parent / "mlflow_artifacts").is_dir()


def test_a_dead_server_blocks_nothing_and_what_waits_is_said(tmp_path: Path) -> None:
    run = config(tmp_path, tracking__uri="http://127.0.0.1:9")
    said: list[str] = []
    reports = Reports(run, said, close_seconds=0.5)
    await_that(lambda: bool(told(said)), 300, "the worker's word")
    os.kill(
        reports.process._process.pid, signal.SIGSTOP
    )  # were it waited for, this would never end
    for step in range(1000):
        reports.log.write(record(step))
    reports.log.event("artifact", path="note.txt")
    folder = run.training.folder
    assert str(Waiting.of(folder)) == "11,000 point(s) and 1 file(s)"
    reports.finish()
    assert told(said)[-1] == (
        "MLflow (http://127.0.0.1:9) did not receive everything: 11,000 point(s), 1 file(s) and "
        f"the status FINISHED wait in {folder}; "
        f"`keel track sync {folder} --to http://127.0.0.1:9` delivers them"
    )
    assert told(said)[0].startswith("MLflow (http://127.0.0.1:9) does not answer: ")
    assert len(told(said)) == 2


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    said: list[str] = []
    reports = Reports(config(tmp_path), said)
    reports.finish()
    first, second = told(said)
    assert "install mlflow-skinny, sqlalchemy and alembic, or set tracking.mlflow=false" in first
    assert "the status FINISHED wait" in second


DIES = """
import os, signal, sys
import psutil
from tests.settings import small_config
from keel_megatron.mlflow_delivery.reporting import open_progress, open_tracker
from keel_megatron.tracking.records import StepRecord
assert not {"torch", "mlflow", "matplotlib"} & sys.modules.keys()
run = small_config(training__runs_dir=sys.argv[1], tracking__mlflow=True)
tracker = open_tracker(run, 0, None, open_progress(run, open(os.devnull, "w")))
tracker.step(StepRecord(1, 5.0, *[1] * 8))
assert "mlflow" not in sys.modules
print(*[child.pid for child in psutil.Process().children()], flush=True)
if sys.argv[2] == "KILLED":
    tracker.last_word("KILLED")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_worker_says_how_a_process_ended_that_cannot(tmp_path: Path, status: str) -> None:
    environment = {key: value for key, value in os.environ.items() if "MLFLOW" not in key}
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(tmp_path), status],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (-9, "")
    wait_for_end_of(int(done.stdout))
    run = config(tmp_path)
    (found,) = mlflow_runs(run)
    assert found.info.status == status
    assert history(run, found.info.run_id, "train/loss") == [(1, 5.0)]


def wait_for_end_of(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(600)


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    run = config(tmp_path)
    said: list[str] = []
    reports = Reports(run, said)
    reports.log.write(record(1))
    reports.process._process.kill()
    reports.process._process.wait()
    reports.finish()
    assert told(said) == []
    assert mlflow_runs(run)[0].info.status == "FINISHED"


def test_no_credential_of_the_environment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "hunter2")
    run = config(tmp_path)
    reports = Reports(run, [])
    reports.finish()
    assert "hunter2" not in json.dumps(flat_params(run))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "delivered.json"} <= {path.name for path in files}
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
