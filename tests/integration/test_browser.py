"""A run that was killed and resumed, in MLflow's own pages, with a real browser."""

from __future__ import annotations

import argparse
import math
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from keel_megatron.checkpoint import folder
from keel_megatron.tracking.metrics import read_metrics
from tests.integration.commands import environment, keel, start, write_config
from tests.tracking.samples import config, history, mlflow_runs
from tools.browser import MISSING, browser

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

STEPS_AFTER_KILL = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run was killed once MLflow had it, and then trained to its end."""
    home = tmp_path_factory.mktemp("killed")
    overrides = {"tracking__mlflow": True, "tracking__depth_every": 1, "checkpoint__every": 4}
    written = write_config(home, Path(argparse.__file__), schedule__decay="constant", **overrides)
    run = home / "runs" / "test"
    with start(home, "train", str(written), "training.steps=100000") as first:
        try:
            _wait(lambda: first.poll() is not None or _stands_past_a_checkpoint(first, run))
        finally:
            _kill(first)
    assert first.returncode == -signal.SIGKILL
    last = read_metrics(run / "metrics.jsonl")[-1]["step"]
    done = keel(home, "train", str(written), f"training.steps={last + STEPS_AFTER_KILL}")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    return home


def _stands_past_a_checkpoint(launcher: subprocess.Popen[str], run: Path) -> bool:
    """Whether MLflow has steps that a resume trains again; then the run is left suspended.

    A run that goes on could save once more before it is killed.
    """
    process = psutil.Process(launcher.pid)
    family = [process, *process.children(recursive=True)]
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.suspend()
    saved = folder.steps(run)
    if saved and _delivered(run) > saved[-1]:
        return True
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.resume()
    return False


def _kill(launcher: subprocess.Popen[str]) -> None:
    """Kill a run with its ranks and its MLflow worker: nobody saves or reports anything more."""
    process = psutil.Process(launcher.pid)
    for each in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def _delivered(run: Path) -> int:
    """Steps that MLflow has of a run that is being trained."""
    try:
        path = run.parent / "mlflow.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            counted = "SELECT count(*) FROM metrics WHERE key = 'train/loss'"
            return int(database.execute(counted).fetchone()[0])
    except sqlite3.Error:
        return 0


def _wait(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    """The run's page, which `keel dashboard` names."""
    command = [sys.executable, "-u", "-m", "keel_megatron", "dashboard", "--port", "0"]
    with subprocess.Popen(
        command, cwd=home, env=environment(), stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = []
            for line in server.stdout:
                said.append(line)
                if "until Ctrl-C" in line:
                    break
            found = r"http://127\.0\.0\.1:\d+/\?token=\S+#/experiments/\d+/runs/\S+"
            pages = re.findall(found, "".join(said))
            assert len(pages) == 1, said
            yield pages[0]
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(300) == 0


def test_steps_that_are_trained_again_have_the_same_loss_twice(home: Path) -> None:
    run = config(home / "runs")
    (found,) = mlflow_runs(run)
    points = history(run, found.info.run_id, "train/loss")
    assert len(points) > len(set(points)) == len({step for step, _ in points})
    assert "resumed.1" in found.data.tags


def test_a_killed_and_resumed_run_is_one_run_with_one_curve(home: Path, address: str) -> None:
    run = home / "runs" / "test"
    wanted = {m["step"]: m["loss"] for m in read_metrics(run / "metrics.jsonl") if "loss" in m}
    assert list(wanted) == list(range(1, len(wanted) + 1))
    with browser(1400, 1000) as shown:
        shown.open(address, "Status")
        page, _, query = shown.driver.current_url.partition("?")
        assert "token" not in page + query
        shown.wait(lambda: "Finished" in shown.text(), "the status")
        assert page.rsplit("/", 1)[1] == (run / "mlflow_run_id").read_text().strip()

        shown.open(f"{page}/model-metrics?{query}", "Auto-refresh")
        shown.type("input[placeholder='Search metric charts']", "^train/loss$")
        steps, losses = shown.wait(lambda: shown.charts().get("train/loss"), "the loss")
        # Steps that were delivered before the kill and trained again are there twice, with the
        # same loss: the line goes over itself.
        assert steps == sorted(steps)
        assert set(steps) == set(wanted)
        for step, loss in zip(steps, losses, strict=True):
            assert math.isclose(loss, wanted[int(step)], rel_tol=1e-12)

        shown.open(f"{page}/artifacts?{query}", "depth_heat_maps.png")
        shown.click_text("depth_heat_maps.png")
        shown.wait(lambda: shown.image_width() > 1000, "the heat maps")

        listed = page.rsplit("/", 1)[0]
        shown.open(f"{listed}?{query}", "1 matching run")
