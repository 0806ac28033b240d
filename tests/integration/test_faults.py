"""Faults as a launcher and its user meet them: what stops a run, and what does not."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest

import yaml
from keel_megatron.checkpoint import folder
from keel_megatron.runtime import exit_codes
from keel_megatron.tracking.metrics import read_metrics
from tests.distributed import run_ranks
from tests.integration.commands import environment, keel, losses_of, write_config
from tests.warm import fork_from
from tools.chaos import chaos
from tools.chaos_faults import Disturbed


def test_the_time_limit_ends_a_run_for_torchrun_and_for_the_local_launcher(tmp_path: Path) -> None:
    """torchrun would start any code but 0 again: it gets 0, and the file has the truth."""
    config = write_config(
        tmp_path,
        Path(argparse.__file__),
        parallel__pipeline=2,
        training__exit_after=0.01,
        training__hang_timeout=200.0,
    )
    run = tmp_path / "runs" / "test"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "-m", "keel_megatron", "train", str(config)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "stopped after step 1 of 6, checkpoint written" in done.stdout
    assert (run / "exit_code").read_text() == "75\n"
    assert folder.steps(run) == [1]

    again = keel(tmp_path, "train", str(config), "--processes", "2", "--max-restarts", "2")
    assert again.returncode == 75, again.stderr
    assert "again" not in again.stderr
    assert folder.steps(run) == [1, 2]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == [
        1,
        2,
    ]

    more = keel(tmp_path, "train", str(config), "training.exit_after=null", "--processes", "2")
    assert more.returncode == 0, more.stderr
    assert (run / "exit_code").read_text() == "0\n"


def test_torchrun_starts_a_killed_group_again_and_the_curve_is_the_same(tmp_path: Path) -> None:
    """Twice: what the first restart leaves in torchrun's store must not hold up the second."""
    text, small = Path(argparse.__file__), {"parallel__pipeline": 2, "checkpoint__every": 2}
    config = write_config(tmp_path, text, **small)
    steps = ["training.steps=30", "training.validation_sequences=4"]
    calm = keel(tmp_path, "train", str(config), *steps, "training.name=calm", "--processes", "2")
    assert calm.returncode == 0, calm.stderr
    metrics = tmp_path / "runs" / "test" / "metrics.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
    with subprocess.Popen(
        [*torchrun, "--nproc-per-node=2", "-m", "keel_megatron", "train", str(config), *steps],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as group:
        for step, rank in ((5, 1), (15, 0)):
            worker = rank_once_at(step, rank, group, metrics)
            worker.kill()
            worker.wait(300)
        assert group.wait(600) == 0
    assert losses_of(metrics) == losses_of(tmp_path / "runs" / "calm" / "metrics.jsonl")


def rank_once_at(step: int, rank: int, group: Any, metrics: Path) -> psutil.Process:
    """The process of a rank of torchrun's group, as soon as a step is done."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and group.poll() is None:
        if len(losses_of(metrics)) >= step:
            for process in psutil.Process(group.pid).children():
                if process.environ().get("RANK") == str(rank):
                    return process
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_a_guard_that_has_had_enough_is_one_message(tmp_path: Path) -> None:
    """Every step of a huge learning rate spikes or is no number; nothing is started again."""
    config = write_config(
        tmp_path,
        Path(argparse.__file__),
        parallel__pipeline=2,
        optimizer__learning_rate=1e30,
        optimizer__clip_grad=0.0,
    )
    sections = yaml.safe_load(config.read_text())
    sections["guard"] = {"action": "skip", "limit": 2}
    config.write_text(yaml.safe_dump(sections))
    ended = keel(tmp_path, "train", str(config), "--processes", "2", "--max-restarts", "2")
    assert ended.returncode == exit_codes.DIVERGED, ended.stderr
    assert ended.stderr.count("training has diverged: step") == 1
    assert "would be skipped update number 3 in a row (grad_norm is nan)" in ended.stderr
    assert "guard.limit = 2" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "gradients are not finite in" in ended.stdout


def disturb(faults: int, home: Path) -> tuple[int, str]:
    """The exit code of `make chaos` and what it says; its processes are forked."""
    fork_from("tools.chaos_faults", "keel_megatron.runtime.local_launch")
    options = argparse.Namespace(faults=faults, seed=3, processes=2, hang_timeout=10.0)
    with redirect_stdout(StringIO()) as said:
        code = chaos(home, options)
    return code, said.getvalue()


@pytest.mark.parametrize(
    "faults",
    [pytest.param(2, id="two kinds"), pytest.param(14, id="every kind", marks=pytest.mark.slow)],
)
def test_a_hurt_run_ends_like_an_unhurt_one(tmp_path: Path, faults: int) -> None:
    """`make chaos` in small: the first kinds of fault, one of each."""
    ((code, said),) = run_ranks(1, disturb, faults, tmp_path, timeout_seconds=1800)
    assert code == 0, said[-3000:]
    kinds = ("NaN in a gradient", *Disturbed.KINDS)
    assert len(kinds) == 14
    for kind in kinds[:faults]:
        assert f"| {kind}" in said
    assert f"{faults} faults, {faults} recovered from; " in said
    assert " 0 checkpoints lost; 0 steps of the loss curve and 0 bits of" in said
    assert "; 0 records missing" in said
