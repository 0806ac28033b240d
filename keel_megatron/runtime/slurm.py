"""SLURM's commands: submission of jobs, and whether those of an earlier command still wait or run.

A folder remembers its jobs in a file, so that the same command does not submit them twice.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from keel_megatron.config.reading import read_small_text
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole

JOB = "slurm_job"
"""File of a folder's jobs, one number per line."""


def sbatch(*arguments: str) -> str:
    """Submit a job with `sbatch --parsable`; returns its number.

    Raises:
        UserError: sbatch refuses.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        raise UserError(f"--executor slurm: sbatch failed: {error.stderr.strip()}") from error
    return done.stdout.strip().split(";")[0]


def remember(folder: Path, *jobs: str) -> None:
    """Write the numbers of a folder's jobs, in place of earlier ones.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(folder / JOB, "".join(f"{job}\n" for job in jobs))


def waiting_jobs(folder: Path) -> list[str]:
    """Those of a folder's jobs of which a part is in the queue or runs.

    Raises:
        UserError: squeue cannot be run, or fails.
    """
    try:
        jobs = read_small_text(folder / JOB).split()
    except (OSError, UnicodeDecodeError):
        return []
    return [job for job in jobs if job.isdecimal() and _is_queued(job)]


def log_pattern(folder: Path, name: str) -> str:
    """A value of sbatch's --output.

    Args:
        folder: the logs' folder, whose `%` are doubled: they are no symbols of sbatch.
        name: the logs' name with sbatch's symbols, such as `slurm-%j.log`.
    """
    return f"{folder.absolute()}".replace("%", "%%") + f"/{name}"


def directive(option: str, value: str) -> str:
    r"""A script's #SBATCH line. In its quotes, sbatch reads \" and \\ as a shell does."""
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{option}="{quoted}"'


def _is_queued(job: str) -> bool:
    """Whether SLURM lists the job; it forgets one some minutes after its end.

    Raises:
        UserError: squeue cannot be run, or fails for another reason.
    """
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", job], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UserError(
            f"--executor slurm: cannot ask whether job {job} is in the queue: squeue: "
            f"{error.strerror}"
        ) from error
    if done.returncode and "invalid job id" not in done.stderr.lower():
        why = done.stderr.strip() or f"exit code {done.returncode}"
        raise UserError(f"--executor slurm: squeue: {why}; try again")
    return not done.returncode and bool(done.stdout.strip())
