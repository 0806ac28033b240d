"""Tags of an MLflow run: code, packages, layout and machines."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from keel_megatron.runtime.versions import package_versions

_JOB_VARIABLES = ("KEEL_JOB_ID", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_NAME")
_HOSTS_LENGTH = 1000


def code_tags() -> dict[str, str]:
    """The commit, the packages' versions, the command, the user and the launcher's job."""
    tags = {f"version.{name}": found for name, found in package_versions().items()}
    tags["mlflow.source.name"] = Path(sys.argv[0]).name or "keel"
    tags["mlflow.source.type"] = "JOB"
    commit = git_commit(Path(__file__).parent)
    if commit is not None:
        tags["mlflow.source.git.commit"], dirty = commit
        tags["git.dirty"] = dirty
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        tags["mlflow.user"] = str(os.getuid())
    job = job_id()
    if job is not None:
        tags["job.id"] = job
    return tags


def place_tags(layout: str, device: str, hosts: Sequence[str]) -> dict[str, str]:
    """Layout, device and hosts of a run.

    Args:
        layout: such as "TP 1 x PP 2 x VPP 1 x DP 1".
        device: the device's name.
        hosts: every rank's host, in rank order.
    """
    nodes = list(dict.fromkeys(hosts))
    shown = ", ".join(nodes)
    if len(shown) > _HOSTS_LENGTH:
        shown = f"{shown[:_HOSTS_LENGTH].rpartition(',')[0]}, ... ({len(nodes)} in all)"
    return {
        "layout": layout,
        "device": device,
        "world_size": str(len(hosts)),
        "nodes": str(len(nodes)),
        "hosts": shown,
    }


def git_commit(folder: Path) -> tuple[str, str] | None:
    """(commit, whether tracked files differ from it: true, false or unknown) of a folder's code.

    An image without a repository names its commit in KEEL_GIT_COMMIT. None if it is unknown, as for
    a package installed into another repository's environment.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(folder, "rev-parse", "HEAD")
        if commit:
            changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
            return commit, "unknown" if changes is None else str(bool(changes)).lower()
    stated = os.environ.get("KEEL_GIT_COMMIT")
    return (stated, "unknown") if stated else None


def job_id() -> str | None:
    """The job that the launcher runs: KEEL_JOB_ID, SLURM's, another scheduler's or torchrun's."""
    for name in _JOB_VARIABLES:
        if os.environ.get(name):
            return os.environ[name]
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return run_id if run_id not in (None, "", "none") else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of git; None if it fails, is absent or takes too long."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
