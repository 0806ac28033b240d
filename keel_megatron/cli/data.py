"""`keel data`."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keel_megatron.cli import data_folders
from keel_megatron.cli.arguments import ConfigPath, Overrides, refuse_unused, sbatch_options
from keel_megatron.cli.help import App

if TYPE_CHECKING:
    from keel_megatron.corpus.build import Execute

app = App(help="Build datasets and show them.")


class Executor(StrEnum):
    """Where the jobs of a build run."""

    LOCAL = "local"
    SLURM = "slurm"
    RAY = "ray"


Workers = Annotated[
    int, typer.Option(min=0, help="Processes (of each task). 0: one per available core; slurm: 1.")
]


@app.command("build")
def build(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Dataset folder. Default: in data.cache_dir, named by content."),
    ] = None,
    executor: Annotated[
        Executor,
        typer.Option(
            help="local: this machine. slurm: an array of jobs. ray: a Ray cluster (datatrove)."
        ),
    ] = Executor.LOCAL,
    workers: Workers = 0,
    tasks: Annotated[int, typer.Option(min=0, help="Tasks on a cluster. 0: up to 64.")] = 0,
    sbatch: Annotated[
        str, typer.Option(help="Further options of sbatch, such as '--partition=cpu'.")
    ] = "",
) -> None:
    """Tokenize the training data into a dataset folder, or show where it is.

    An interrupted build resumes.
    """
    from keel_megatron.config.load import load_config
    from keel_megatron.corpus.ensure import build_dataset
    from keel_megatron.data.manifest import MANIFEST

    data = load_config(config, overrides or ()).data
    place = ["--out", str(out)] if out else []
    again = ["data", "build", str(config), *(overrides or ()), *place]
    folder = build_dataset(data, print, out, _execute(executor, workers, tasks, sbatch, again))
    if (folder / MANIFEST).is_file():  # otherwise a cluster finishes it later
        how = shlex.join(["keel", "train", *again[2:]])
        if out:
            how = f"with {shlex.quote(f'data.dataset={out}')}"
        print(f"train on it: {how}")


app.command("show")(data_folders.show)
app.command("verify")(data_folders.verify)
app.command("sample")(data_folders.sample)


@app.command("task")
def task(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The .partial folder of a build.")
    ],
    task: Annotated[int, typer.Option(help="Number of the task, counted from 0.")],
    tasks: Annotated[int, typer.Option(min=1, help="Total number of tasks.")],
    workers: Workers = 0,
) -> None:
    """Run one task of a build; `keel data build --executor slurm` submits these."""
    from keel_megatron.corpus.cluster import run_task
    from keel_megatron.runtime.cores import available_cores

    run_task(folder, task, tasks, workers or available_cores(), print)


def _execute(
    executor: Executor, workers: int, tasks: int, sbatch: str, again: list[str]
) -> Execute:
    """What does the jobs.

    Raises:
        UserError: an option does not fit the executor, or what the executor needs is missing.
    """
    from keel_megatron.corpus import cluster
    from keel_megatron.corpus.build import local

    if executor is Executor.SLURM:
        return cluster.slurm(
            tasks=tasks, workers=workers or 1, again=again, options=sbatch_options(sbatch)
        )
    if executor is Executor.RAY:
        refuse_unused(executor, sbatch=sbatch)
        return cluster.ray(tasks=tasks, workers=workers)
    refuse_unused(executor, sbatch=sbatch, tasks=tasks)
    return local(workers)
