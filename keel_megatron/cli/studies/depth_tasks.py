"""`keel study depth-tasks`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.choices import listed, some_of
from keel_megatron.config.run import RunConfig
from keel_megatron.studies import depth_tasks as task_study
from keel_megatron.studies.generated_tasks import LARGEST, TASKS
from keel_megatron.studies.grid import Axes, Study


def depth_tasks(
    config: RunConfig,
    axes: Axes,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK,...",
            help=f"Of {', '.join(TASKS)}. Default: all.",
            **some_of(lambda: TASKS),
        ),
    ] = None,
    largest: Annotated[
        int, typer.Option(min=1, max=LARGEST, help="Maximum number of steps of a question.")
    ] = task_study.STEPS,
    documents: Annotated[
        int, typer.Option(min=1, help="Documents in each task's training text.")
    ] = task_study.DOCUMENTS,
    questions: Annotated[
        int, typer.Option(min=1, help="Test questions per number of steps, after training.")
    ] = task_study.QUESTIONS,
) -> Study:
    """Train on generated tasks that need k sequential steps, where depth should help."""
    names = listed(tasks) or tuple(TASKS)
    return task_study.study(config, axes, names, largest, documents, questions)
