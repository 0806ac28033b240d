"""Does a build's jobs on many nodes: SLURM arrays of our own command, or Ray through datatrove.

The folder must be on a file system that all nodes share. A task does a contiguous part of the jobs;
jobs that are complete are left out, so a task can be repeated.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from keel_megatron.corpus.build import Execute
from keel_megatron.corpus.finish import unfinished
from keel_megatron.corpus.paths import failed
from keel_megatron.corpus.plan import JOBS, Job, Plan, read_plan
from keel_megatron.corpus.pool import run_jobs
from keel_megatron.corpus.progress import BuildProgress
from keel_megatron.errors import UserError
from keel_megatron.runtime.interpreter import python
from keel_megatron.runtime.slurm import log_pattern, remember, sbatch, waiting_jobs

MOST_TASKS: Final = 64
"""Default number of tasks, unless there are fewer jobs."""


def jobs_of_task(plan: Plan, task: int, tasks: int) -> tuple[Job, ...]:
    """The jobs of task `task` of `tasks`."""
    count = len(plan.jobs)
    return plan.jobs[task * count // tasks : (task + 1) * count // tasks]


def run_task(folder: Path, task: int, tasks: int, workers: int, say: Callable[[str], None]) -> None:
    """Do a task's jobs that are not complete, on this machine.

    Args:
        folder: the folder that is being built (FOLDER.partial).
        task: number of the task.
        tasks: number of all tasks.
        workers: number of processes.
        say: called with progress.

    Raises:
        UserError: the folder has no plan or cannot be written, or a job failed.
    """
    try:
        plan = read_plan(folder)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not the .partial folder of a build in progress; start it with keel data "
            "build CONFIG"
        ) from error
    if not 0 <= task < tasks:
        raise UserError(f"--task: {task} must be from 0 to {tasks - 1}")
    left = {job.name for job in unfinished(folder, plan)}
    jobs = [job for job in jobs_of_task(plan, task, tasks) if job.name in left]
    progress = BuildProgress(say, folder / JOBS / f"task-{task:05}.log")
    progress.begin(sum(job.bytes for job in jobs))
    try:
        run_jobs(folder, plan, jobs, workers, progress.add)
        progress.say(f"task {task} of {tasks}: {progress.line()}")
    except OSError as error:
        raise failed(error, folder) from error
    finally:
        progress.close()


def task_count(plan: Plan, wanted: int) -> int:
    """Number of tasks: as wanted, but not more than jobs."""
    return max(1, min(wanted or MOST_TASKS, len(plan.jobs)))


def slurm(
    *, tasks: int, workers: int, again: Sequence[str], options: Sequence[str] = ()
) -> Execute:
    """Submits the jobs as an array, and a job that finishes the build after it.

    No description of the work is handed over but our command line and the plan in the folder.

    Args:
        tasks: number of array tasks; 0: up to MOST_TASKS.
        workers: processes, and cores, of a task.
        again: arguments of `keel` that repeat this build on one machine: it does what is left.
        options: further options of sbatch, for both.

    Raises:
        UserError: there is no sbatch here.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "--executor slurm: there is no sbatch in PATH; run this on a node that submits jobs"
        )

    def execute(partial: Path, plan: Plan, progress: BuildProgress) -> None:
        """Submit the array of tasks and the job that finishes the build, unless they wait or run.

        Raises:
            UserError: they do, or squeue or sbatch fails.
        """
        logs = partial / JOBS
        _refuse_waiting(logs)
        if not unfinished(partial, plan):
            return
        count = task_count(plan, tasks)
        keel = [*python(), "-m", "keel_megatron"]
        task = shlex.join([*keel, "data", "task", str(partial.absolute()), "--tasks", str(count)])
        common = [f"--cpus-per-task={workers}", "--ntasks=1", *options]
        array = sbatch(
            f"--array=0-{count - 1}",
            "--job-name=keel-data",
            f"--output={log_pattern(logs, 'slurm-%A_%a.log')}",
            *common,
            f'--wrap={task} --workers {workers} --task "$SLURM_ARRAY_TASK_ID"',
        )
        remember(logs, array)
        finish = sbatch(
            f"--dependency=afterany:{array}",
            "--job-name=keel-data-finish",
            f"--output={log_pattern(partial.parent, 'slurm-%j.log')}",
            *common,
            f"--wrap={shlex.join([*keel, *again, '--workers', str(workers)])}",
        )
        remember(logs, array, finish)
        progress.say(
            f"submitted {count} tasks as job {array}, and job {finish}, which finishes the build; "
            f"their logs are in {logs} and {partial.parent}"
        )

    return execute


def _refuse_waiting(logs: Path) -> None:
    """Refuse to submit a build again while its jobs may work.

    Raises:
        UserError: one waits or runs, or squeue fails.
    """
    if jobs := waiting_jobs(logs):
        raise UserError(
            f"--executor slurm: job {jobs[0]} of this build is still in the queue; wait until it "
            f"has ended, or cancel the build: scancel {' '.join(jobs)}"
        )


def ray(*, tasks: int, workers: int) -> Execute:
    """Does the jobs on a Ray cluster, through datatrove's executor; waits for them.

    Raises:
        UserError: datatrove or Ray is not installed.
    """
    try:
        from datatrove.executor.ray import RayPipelineExecutor

        from keel_megatron.corpus.datatrove_step import BuildStep
    except ImportError as error:
        raise UserError(
            f"--executor ray: {error}; install it: pip install 'keel-megatron[data-cluster]'"
        ) from error

    def execute(partial: Path, plan: Plan, progress: BuildProgress) -> None:
        """Run the tasks through datatrove and wait for them."""
        count = task_count(plan, tasks)
        progress.say(f"running {count} tasks on Ray; their logs are in {partial / JOBS}")
        RayPipelineExecutor(
            pipeline=[BuildStep(str(partial.absolute()))],
            tasks=count,
            workers=workers or -1,
            logging_dir=str(partial.absolute() / JOBS / "datatrove"),
            skip_completed=False,
        ).run()
        left = unfinished(partial, plan)
        if left:
            raise UserError(
                f"--executor ray: {len(left)} of {len(plan.jobs)} jobs are not complete, such as "
                f"{left[0].name}; see the logs in {partial / JOBS / 'datatrove'}, and build "
                "again to resume"
            )

    return execute
