"""A run with its tracker and its MLflow worker: what is reported, and how its status ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.config import UserError
from keel_megatron.mlflow_delivery.reporting import open_tracker, where
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.tracking.records import ValidationRecord
from tests.tracking.samples import config, history, mlflow_runs, record


def test_a_normal_end_is_finished_and_everything_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(tmp_path)
    with open_tracker(run, rank=0, resume_step=None) as tracker:
        assert tracker.folder == tmp_path / "test"
        tracker.say("here we go")
        for step in range(1, 4):
            tracker.step(record(step, loss=1.0 / step))
        tracker.step(ValidationRecord(3, 0.25, 48, 1536))
    tracker.close("FAILED")  # the first end counts
    (found,) = mlflow_runs(run)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["validation/loss"] == 0.25
    lines = read_metrics(tracker.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    shown = capsys.readouterr().out
    log = (tracker.folder / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in log] == shown.splitlines()
    assert shown.startswith("here we go\n")
    assert "step 3: validation loss 0.2500" in shown


@pytest.mark.parametrize(
    ("error", "status", "logged"),
    [
        (ValueError("a bug"), "FAILED", "ValueError: a bug"),
        (UserError("data.text: missing"), "FAILED", "error: data.text: missing"),
        (SystemExit(1), "FAILED", "SystemExit: 1"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
    ],
)
def test_the_status_is_how_it_ended(
    tmp_path: Path, error: BaseException, status: str, logged: str
) -> None:
    run = config(tmp_path)

    def end_badly() -> None:
        with open_tracker(run, rank=0, resume_step=None) as tracker:
            tracker.step(record(1))
            raise error

    with pytest.raises(type(error)):
        end_badly()
    (found,) = mlflow_runs(run)
    assert found.info.status == status
    assert history(run, found.info.run_id, "train/loss") == [(1, 1.0)]
    log = [
        line.split(" ", 1)[1] for line in (run.training.folder / "log.txt").read_text().splitlines()
    ]
    # On a busy machine it may tell that it waits.
    assert [line for line in log if not line.startswith("waiting up to")][-1] == logged


def test_an_end_that_was_told_is_kept(tmp_path: Path) -> None:
    run = config(tmp_path)
    with open_tracker(run, rank=0, resume_step=None) as tracker:
        tracker.close("KILLED")
    assert mlflow_runs(run)[0].info.status == "KILLED"


def test_resuming_goes_on_and_starting_anew_starts_anew(tmp_path: Path) -> None:
    run = config(tmp_path)
    metrics = run.training.folder / "metrics.jsonl"
    for resume_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        with open_tracker(run, rank=0, resume_step=resume_step) as tracker:
            for step in steps:
                tracker.step(record(step))
    assert [line["step"] for line in read_metrics(metrics)] == [1, 2, 3, 4]
    assert len(mlflow_runs(run)) == 1
    with open_tracker(run, rank=0, resume_step=None) as tracker:
        tracker.step(record(1))
    assert [line["step"] for line in read_metrics(metrics)] == [1]
    first, second = mlflow_runs(run)
    assert history(run, first.info.run_id, "train/loss")[-1][0] == 4
    assert history(run, second.info.run_id, "train/loss") == [(1, 1.0)]


def test_what_its_launcher_starts_again_is_the_same_run_without_a_checkpoint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path)
    for restart, losses in (("0", (5.0, 4.0)), ("1", (5.0,))):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        with open_tracker(run, rank=0, resume_step=None) as tracker:
            for step, loss in enumerate(losses, start=1):
                tracker.step(record(step, loss))
    (found,) = mlflow_runs(run)
    assert set(history(run, found.info.run_id, "train/loss")) == {(1, 5.0), (2, 4.0)}
    assert found.data.tags["resumed.1"].startswith("from step 0, ")


def test_a_validation_may_come_as_a_step(tmp_path: Path) -> None:
    run = config(tmp_path, tracking__mlflow=False)
    with open_tracker(run, rank=0, resume_step=None) as tracker:
        tracker.step(ValidationRecord(3, 0.25, 48, 1536))
    assert read_metrics(tracker.folder / "metrics.jsonl")[0]["validation_loss"] == 0.25
    assert "step 3: validation loss 0.2500" in (tracker.folder / "log.txt").read_text()
    assert not (tracker.folder / "mlflow.db").exists()


def test_an_end_that_goes_wrong_still_closes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a second Ctrl-C while MLflow is waited for."""
    run = config(tmp_path)
    tracker = open_tracker(run, rank=0, resume_step=None)

    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    closed: list[str] = []
    monkeypatch.setattr("keel_megatron.mlflow_delivery.process.WorkerProcess.finish", interrupted)
    monkeypatch.setattr(
        "keel_megatron.tracking.progress.Progress.close", lambda self: closed.append("progress")
    )
    monkeypatch.setattr(
        "keel_megatron.tracking.metrics.MetricsFile.close", lambda self: closed.append("metrics")
    )
    with pytest.raises(KeyboardInterrupt):
        tracker.close("FINISHED")
    assert closed == ["metrics", "progress"]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config(tmp_path)

    def end_badly() -> None:
        with open_tracker(run, rank=1, resume_step=None) as tracker:
            tracker.step(record(1))
            tracker.step(ValidationRecord(1, 0.5, 16, 512))
            tracker.say("nothing")
            tracker.artifact(tmp_path / "nothing")
            tracker.tags({"a": "b"})
            tracker.rewind(0)
            tracker.last_word("KILLED")
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        end_badly()
    assert capsys.readouterr() == ("", "")
    assert not run.training.folder.exists()


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        (None, "keel dashboard runs/test  (extra: dashboard)"),
        ("sqlite:////big disk/all.db", "keel dashboard runs/test  (extra: dashboard)"),
        ("http://host:5000", "http://host:5000"),
        (
            "mysql://host/my db",
            "mlflow ui --backend-store-uri 'mysql://host/my db'  (extra: dashboard)",
        ),
    ],
)
def test_where_everything_is(uri: str | None, line: str) -> None:
    run = config(Path("runs"), tracking__uri=uri)
    files, dashboard, generate = where(run)
    assert files.split()[:2] == ["files", "runs/test/"]
    assert "metrics.jsonl" in files
    assert dashboard == f"dashboard  {line}"
    assert generate == "generate   keel generate runs/test --prompt TEXT"
    assert len(where(config(Path("runs"), tracking__mlflow=False))) == 2
