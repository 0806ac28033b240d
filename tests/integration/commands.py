"""Run the `keel` command as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from keel_megatron.tracking.metrics import read_metrics
from tests.settings import settings

Completed = subprocess.CompletedProcess[str]


def keel(folder: Path, *arguments: str, timeout: float = 600) -> Completed:
    """`keel ARGUMENTS` in a folder; its output is taken, its exit code left to the caller."""
    return subprocess.run(
        [sys.executable, "-m", "keel_megatron", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
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
