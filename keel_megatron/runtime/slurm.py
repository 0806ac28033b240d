"""Submission of SLURM jobs."""

from __future__ import annotations

import subprocess

from keel_megatron.errors import UserError


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
