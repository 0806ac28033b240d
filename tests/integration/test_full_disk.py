"""A run whose disk is full for a while: it goes on, and has all its records in the end."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keel_megatron.checkpoint import folder
from keel_megatron.mlflow_delivery.outbox_reader import OutboxReader
from keel_megatron.tracking.metrics import read_metrics
from tests.integration.commands import environment, write_config

# From before step 3 until before step 9 nothing can be added to any file.
RUN = """
import resource, sys
from pathlib import Path
from keel_megatron.cli.console import outlive_full_disk, tolerate_consoles
from keel_megatron.training.run import run_training

config, kind, runs = sys.argv[1:]
hog = Path(runs) / "hog"
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

def fill(position, engine):
    if position.step == 2 and kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    elif position.step == 2:
        try:
            with hog.open("wb", buffering=0) as stream:
                while stream.write(bytes(1000)):
                    pass
        except OSError:
            pass
    elif position.step == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        hog.unlink(missing_ok=True)

tolerate_consoles()
outlive_full_disk()
sys.exit(run_training(Path(config), before_step=fill).exit_code)
"""


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command).returncode:
        pytest.skip("mounts a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.security
@pytest.mark.parametrize("kind", ["limit", pytest.param("tmpfs", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_a_while_costs_no_record(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    runs = tmp_path / "runs"
    if kind == "tmpfs":
        runs = request.getfixturevalue("tmpfs")
    (tmp_path / "without" / "mlflow").mkdir(parents=True)  # what it would get stays in the outbox
    (tmp_path / "without" / "mlflow" / "__init__.py").write_text("raise ImportError")
    config = write_config(
        tmp_path,
        Path(argparse.__file__),
        data__cache_dir=str(tmp_path / "cache"),
        training__runs_dir=str(runs),
        training__validate_every=4,
        checkpoint__every=3,
        checkpoint__on_error="continue",
        tracking__mlflow=True,
        tracking__depth_every=2,
    )
    config.write_text(config.read_text().replace("steps: 6", "steps: 12"))
    path = os.pathsep.join([str(tmp_path / "without"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, str(config), kind, str(runs)],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = runs / "test"
    assert (run / "exit_code").read_text() == "0\n"
    assert folder.steps(run)[-1] == 12
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8, 12]
    assert [line["step"] for line in lines if "depth" in line] == [1, 2, 4, 6, 8, 10, 12]
    reports = [item.values for item in OutboxReader(run).waiting() if item.kind == "metrics"]
    assert [item["step"] for item in reports if "loss" in item["values"]] == list(range(1, 13))
    log = (run / "log.txt").read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\dT[\d:]{8}Z ", line) for line in log.splitlines())
    for step in (3, 6):
        assert f"the checkpoint of step {step} was not written" in log
    if kind == "limit":  # a disk has some room left, within files' last blocks
        assert log.count("cannot write") == 1  # metrics.jsonl; the log's is shown
        assert done.stdout.count("cannot write") == 2
    assert "Traceback" not in done.stderr
    assert list(run.glob("*.partial")) == []
