"""Run the `keel` command as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from keel_megatron.tracking.metrics import read_metrics
from tests import warm
from tests.settings import settings

Completed = subprocess.CompletedProcess[str]


def keel(folder: Path, *arguments: str, timeout: float = 600, fresh: bool = False) -> Completed:
    """`keel ARGUMENTS` in a folder; its output is taken, its exit code left to the caller.

    Args:
        folder: the working directory.
        arguments: of the command.
        timeout: seconds.
        fresh: start an interpreter, as a user's shell does (tests/warm.py says what differs).
    """
    with start(folder, *arguments, fresh=fresh) as process:
        try:
            said = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    assert process.returncode is not None
    return Completed(process.args, process.returncode, *said)


def start(folder: Path, *arguments: str, fresh: bool = False) -> subprocess.Popen[str] | warm.Warm:
    """`keel ARGUMENTS` in a folder, at work."""
    if warm.AVAILABLE and not fresh:
        return warm.Warm(arguments, folder, environment())
    return subprocess.Popen(
        [sys.executable, "-m", "keel_megatron", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def environment() -> dict[str, str]:
    """This environment without a launcher's variables."""
    dropped = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in dropped}


def losses_of(metrics: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step in a metrics.jsonl."""
    return [(m["step"], m["loss"], m["grad_norm"]) for m in read_metrics(metrics) if "loss" in m]


def write_config(folder: Path, text: Path, **overrides: Any) -> Path:
    """A small run's YAML over some text."""
    path = folder / "run.yaml"
    sections = settings(data__text=str(text), training__steps=6, **overrides)
    path.write_text(yaml.safe_dump(sections))
    return path
