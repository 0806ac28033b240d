"""Starts of a run that is being trained, and starts that are broken off."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import psutil

from keel_megatron.checkpoint import folder
from keel_megatron.runtime.ownership import FILE, take
from keel_megatron.tracking.metrics import read_metrics
from tests.hosts import await_that
from tests.integration.commands import keel, start, write_config

TEXT = Path(argparse.__file__)


def marks(run: Path) -> dict[str, object]:
    """What a second start that is let in changes: which files there are, and by whom."""
    kept = ("config.yaml", "mlflow_run_id", "metrics.jsonl", "log.txt", FILE)
    return {
        "starts": (run / "outbox" / "events.jsonl").read_text().count('"kind": "start"'),
        "ended": (run / "exit_code").exists(),
        "written": (run / "config.yaml").stat().st_mtime_ns,
        "files": {name: (run / name).stat().st_ino for name in kept},
    }


def test_a_run_that_is_trained_is_left_alone_and_free_once_its_ranks_are_gone(
    tmp_path: Path,
) -> None:
    write_config(tmp_path, TEXT, tracking__mlflow=True, checkpoint__every=0)
    run = tmp_path / "runs" / "test"
    metrics = run / "metrics.jsonl"
    long = "training.steps=100000"
    with start(tmp_path, "train", "run.yaml", "--processes", "2", long) as first:
        try:
            await_that(lambda: len(read_metrics(metrics)) > 3, 200, "steps")
            await_that(lambda: (run / "mlflow_run_id").exists(), 200, "MLflow's run")
            before = marks(run)
            refused = keel(tmp_path, "train", "run.yaml", long, "--processes", "2")
            pruned = keel(tmp_path, "checkpoint", "prune", "runs/test")
            steps = len(read_metrics(metrics))
            await_that(lambda: len(read_metrics(metrics)) > steps, 60, "another step")
            assert marks(run) == before
            ranks = psutil.Process(first.pid).children()
            first.kill()
            first.wait()
            # They save and end; then the run is whoever's asks for it.
            await_that(lambda: not any(map(works, ranks)), 120, "the ranks' end")
            take(run).release()
        finally:
            first.kill()
    named = f"error: runs/test is being trained by process {first.pid} on host "
    assert (refused.returncode, pruned.returncode) == (2, 2)
    assert refused.stderr.startswith(named)
    assert pruned.stderr.startswith(named)
    assert refused.stdout == ""
    recorded = [line["step"] for line in read_metrics(metrics) if "loss" in line]
    assert recorded == list(range(1, recorded[-1] + 1))
    assert (run / "exit_code").read_text() == "143\n"
    assert folder.steps(run) == [recorded[-1]]
    assert not (run / FILE).exists()


def works(process: psutil.Process) -> bool:
    """Whether it has not ended; one whose parent was killed may stay a zombie."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_signal_while_the_data_is_prepared_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT.read_text() * 200)
    write_config(tmp_path, tmp_path / "text")
    with start(tmp_path, "train", "run.yaml", "--processes", "2") as process:
        assert process.stdout is not None
        while "training a tokenizer" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _shown, errors = process.communicate(timeout=240)
    assert process.returncode == 143
    assert errors == "SIGTERM: no step was made yet, ending\n"
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "data").glob("*/data.json"))
