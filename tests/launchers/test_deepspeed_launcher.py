"""launchers/deepspeed.sh starts the real thing on this machine, as a hostfile of one host says."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from tests.integration.commands import losses_of, write_config
from tests.launchers.test_arguments import needs_plain_path
from tests.launchers.test_launchers import launch
from tests.ports import reserved_port

SETTINGS = ("parallel.pipeline=2", "training.steps=2", "training.validation_sequences=4")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed")
def test_a_hostfile_of_one_host_trains(tmp_path: Path) -> None:
    write_config(tmp_path, Path(argparse.__file__))
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    with reserved_port() as port:
        variables = {"timeout": 600, "MASTER_PORT": str(port)}
        done = launch("deepspeed.sh", "run.yaml", *SETTINGS, folder=tmp_path, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = losses_of(tmp_path / "runs" / "test" / "metrics.jsonl")
    assert [step for step, _loss, _norm in losses] == [1, 2]
    assert "2 process(es) on cpu, 1 thread(s) each: TP 1 x PP 2 x DP 1" in done.stdout


@needs_plain_path
def test_a_host_that_does_not_answer_is_told(tmp_path: Path) -> None:
    write_config(tmp_path, Path(argparse.__file__))
    (tmp_path / "hostfile").write_text("host.invalid slots=2\n")
    (tmp_path / "bin").mkdir()
    for name in ("pdsh", "ssh"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 255\n")
        (tmp_path / "bin" / name).chmod(0o755)
    done = launch("deepspeed.sh", "run.yaml", folder=tmp_path, path=tmp_path / "bin")
    assert done.returncode == 2
    assert "host.invalid: no answer by ssh in 5 s" in done.stderr or "not installed" in done.stderr
