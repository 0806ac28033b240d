"""Runs a grid as a SLURM array: each task is launchers/slurm.sbatch with one run.

So a run uses all nodes of its task, saves before the time limit and is requeued. The same command
again reads the results; runs that have none and are not in the queue any more are submitted again.
The study's folder and the data must be on a file system that all nodes share.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import keel_megatron
from keel_megatron.config.bundled import locate
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole
from keel_megatron.runtime.slurm import directive, log_pattern, remember, sbatch, waiting_jobs
from keel_megatron.runtime.tables import count
from keel_megatron.studies.grid import Grid, GridRun
from keel_megatron.studies.results import LOGS, has_result

SCRIPT = "slurm.sbatch"
_SCRIPT = """\
#!/usr/bin/env bash
# Written by `keel study`: task N of the array trains one run of the study.
# It has the #SBATCH lines of launchers/slurm.sbatch; options of --sbatch replace them.
{directives}
set -euo pipefail
export KEEL_ROOT={root}
cd {folder}
case $SLURM_ARRAY_TASK_ID in
{cases}
*)
    echo "error: the study has no run $SLURM_ARRAY_TASK_ID" >&2
    exit 2
    ;;
esac
exec bash "$KEEL_ROOT/launchers/slurm.sbatch" "$@"
"""

Say = Callable[[str], None]


def run_on_slurm(
    grid: Grid, parallel: int, options: Sequence[str], say: Say, *, submit: bool = True
) -> list[str]:
    """Submit the runs that have no result and are not in the queue.

    Args:
        grid: the runs.
        parallel: tasks at the same time.
        options: further options of sbatch.
        say: called with messages.
        submit: False only writes the script.

    Returns:
        Names of the runs that have no result yet.

    Raises:
        UserError: there is no sbatch here, it refuses, squeue fails, or a file cannot be read or
            written.
    """
    left = [run for run in grid.runs if not has_result(run)]
    if not left:
        return []
    if jobs := waiting_jobs(grid.out):
        say(f"job {jobs[0]} is still in the queue; run this command again when it has ended")
        return [run.name for run in left]
    if submit and shutil.which("sbatch") is None:
        raise UserError(
            "--executor slurm: there is no sbatch in PATH; run this on a node that submits jobs"
        )
    script = grid.out / SCRIPT
    (grid.out / LOGS).mkdir(parents=True, exist_ok=True)
    write_whole(script, script_text(grid, left, _root()))
    if submit:
        array = f"--array=0-{len(left) - 1}%{parallel}"
        job = sbatch(array, *options, str(script))
        remember(grid.out, job)
        say(
            f"submitted {count(len(left), 'run')} as job {job}, {parallel} at a time; when it has "
            f"ended, run this command again for the results (logs: {grid.out / LOGS})"
        )
    return [run.name for run in left]


def script_text(grid: Grid, runs: Sequence[GridRun], root: Path) -> str:
    """The batch script of an array.

    Args:
        grid: the study's runs.
        runs: those to train, by their task's number.
        root: the repository.
    """
    launcher = (root / "launchers" / "slurm.sbatch").read_text(encoding="utf-8")
    own = ("--job-name", "--output")
    directives = [
        line
        for line in launcher.splitlines()
        if line.startswith("#SBATCH ") and not line.split()[1].startswith(own)
    ]
    directives += [
        f"#SBATCH --job-name=keel-{grid.study.name}",
        directive("output", log_pattern(grid.out / LOGS, "slurm-%A_%a.log")),
    ]
    cases = [
        f"{number}) set -- {shlex.join([str(locate(run.path)), *run.settings])} ;;  # {run.name}"
        for number, run in enumerate(runs)
    ]
    return _SCRIPT.format(
        directives="\n".join(directives),
        root=shlex.quote(str(root)),
        folder=shlex.quote(os.getcwd()),
        cases="\n".join(cases),
    )


def _root() -> Path:
    """The repository, which has the launchers.

    Raises:
        UserError: it is not known.
    """
    installed = Path(keel_megatron.__file__).resolve().parents[1]
    for root in (Path(os.environ.get("KEEL_ROOT") or installed), installed):
        if (root / "launchers" / "slurm.sbatch").is_file():
            return root.absolute()
    raise UserError(
        "--executor slurm: there is no launchers/slurm.sbatch; set KEEL_ROOT to the repository"
    )
