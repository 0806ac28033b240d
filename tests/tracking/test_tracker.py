"""The tracker: what is shown, what MLflow gets, how a run's status ends."""

from __future__ import annotations

import io
import os
import pty
import select
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from keel_megatron.config.run import RunConfig
from keel_megatron.tracking.mlflow_sink import MlflowSink, tracking_uri
from keel_megatron.tracking.progress import Display
from keel_megatron.tracking.records import ValidationRecord
from keel_megatron.tracking.tracker import Tracker, open_tracker, where
from tests.settings import small_config
from tests.tracking.test_metrics import record


def config(tmp_path: Path, **overrides: Any) -> RunConfig:
    return small_config(
        training__runs_dir=str(tmp_path),
        training__steps=4,
        tracking__mlflow=True,
        **overrides,
    )


def mlflow_runs(run: RunConfig) -> list[Any]:
    client = MlflowClient(tracking_uri=tracking_uri(run))
    experiment = client.get_experiment_by_name(run.tracking.experiment)
    return list(client.search_runs([experiment.experiment_id]))


def test_mlflow_gets_parameters_metrics_files_and_the_status(tmp_path: Path) -> None:
    run = config(tmp_path)
    with open_tracker(run, rank=0, resume_step=None) as tracker:
        for step in range(1, 4):
            tracker.step(record(step, loss=1.0 / step))
        tracker.step(ValidationRecord(3, 0.25, 48, 1536))
        (run.training.folder / "note.txt").write_text("kept")
        tracker.artifact(run.training.folder / "note.txt")
    (found,) = mlflow_runs(run)
    client = MlflowClient(tracking_uri=tracking_uri(run))
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "test"
    assert found.data.params["model.blocks"] == "8"
    assert found.data.tags["version.megatron-core"] == "0.16.1"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert found.data.metrics["validation_loss"] == 0.25
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["note.txt"]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_the_status_is_how_it_ended(
    tmp_path: Path, error: type[BaseException], status: str
) -> None:
    run = config(tmp_path)

    def end_badly() -> None:
        with open_tracker(run, rank=0, resume_step=None) as tracker:
            tracker.step(record(1))
            raise error

    with pytest.raises(error):
        end_badly()
    assert mlflow_runs(run)[0].info.status == status


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path: Path) -> None:
    run = config(tmp_path)
    for resume_step, steps in ((None, (1, 2)), (2, (3, 4))):
        with open_tracker(run, rank=0, resume_step=resume_step) as tracker:
            for step in steps:
                tracker.step(record(step))
    (found,) = mlflow_runs(run)
    history = MlflowClient(tracking_uri=tracking_uri(run)).get_metric_history(
        found.info.run_id, "loss"
    )
    assert [point.step for point in history] == [1, 2, 3, 4]


def test_a_stray_mlruns_folder_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlruns").mkdir()
    monkeypatch.chdir(tmp_path)
    run = config(tmp_path / "runs")
    with open_tracker(run, rank=0, resume_step=None) as tracker:
        tracker.step(record(1))
    assert mlflow_runs(run)[0].info.status == "FINISHED"
    assert list((tmp_path / "mlruns").iterdir()) == []


def test_a_dead_server_is_said_once_and_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("keel_megatron.tracking.mlflow_sink._CLOSE_SECONDS", 5.0)
    run = config(tmp_path, tracking__uri="http://127.0.0.1:9")
    said: list[str] = []
    sink = MlflowSink(run, said.append)
    started = time.monotonic()
    for step in range(1000):
        sink.record(record(step))
    assert time.monotonic() - started < 0.1
    sink.finish("FINISHED")
    assert time.monotonic() - started < 20
    assert len(said) == 2
    assert "does not answer" in said[0]
    assert "did not take everything" in said[1]


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    display = Display(4, tmp_path / "log.txt", log_every=2, stream=stream)
    for step in range(1, 5):
        display.step(record(step))
    display.step(record(4))
    display.close()
    lines = stream.getvalue().splitlines()
    assert " ".join(lines[0].split()) == ("step loss grad norm learning rate tokens/s time left")
    assert lines[1].split()[:5] == ["2/4", "1.0000", "0.500", "1.000e-03", "1,000"]
    assert lines[2].split()[0] == "4/4"
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in logged] == lines


def test_a_terminal_gets_a_live_line_and_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        display = Display(2, tmp_path / "log.txt", log_every=1, stream=terminal)
        display.step(record(1))
        display.say("said above [brackets stay]")
        display.step(record(2, loss=1.2345))
        display.close()
        terminal.flush()
        shown = ""
        while select.select([master], [], [], 0.2)[0]:
            shown += os.read(master, 65536).decode(errors="replace")
    os.close(master)
    assert "loss 1.2345" in shown
    assert "said above [brackets stay]" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path)
    tracker = open_tracker(run, rank=1, resume_step=None)
    assert type(tracker) is Tracker
    with tracker:
        tracker.step(record(1))
        tracker.say("nothing")
    assert capsys.readouterr().out == ""
    assert not run.training.folder.exists()


def test_where_everything_is(tmp_path: Path) -> None:
    run = config(tmp_path)
    assert str(run.training.folder) in where(run)[0]
    assert f"--backend-store-uri {tracking_uri(run)}" in where(run)[1]
