"""What is asked of SLURM, and what is written for it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from keel_megatron.errors import UserError
from keel_megatron.runtime.slurm import directive, log_pattern, remember, waiting_jobs


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a stand-in before SLURM's command."""
    (folder / "squeue").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('[ "$3" = 8 ] && echo "8 batch"; exit 0', ["8"]),
        ("exit 0", []),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", []),
    ],
)
def test_the_jobs_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: list[str]
) -> None:
    squeue(tmp_path, monkeypatch, script)
    assert waiting_jobs(tmp_path) == []  # it has none
    remember(tmp_path, "7", "8")
    assert waiting_jobs(tmp_path) == expected


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "Unable"),
        ("exit 3", "squeue: exit code 3; try again"),
    ],
)
def test_no_answer_does_not_mean_that_a_job_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    squeue(tmp_path, monkeypatch, script)
    remember(tmp_path, "7")
    with pytest.raises(UserError, match=why):
        waiting_jobs(tmp_path)


def test_a_path_of_any_characters() -> None:
    """In double quotes the shell and sbatch read a backslash and a quote alike."""
    pattern = log_pattern(Path('/a b/10% "#1"'), "slurm-%j.log")
    assert pattern == '/a b/10%% "#1"/slurm-%j.log'
    start, option = shlex.split(directive("output", pattern))
    assert (start, option) == ("#SBATCH", f"--output={pattern}")
