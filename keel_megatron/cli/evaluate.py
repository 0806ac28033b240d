"""`keel evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.errors import UserError
from keel_megatron.runtime.local_launch import launch
from keel_megatron.runtime.processes import is_rank

MODEL_PROCESSES = "--model-processes"

_Source = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, runs/NAME, or of a checkpoint.")
]
_Text = Annotated[
    list[Path] | None,
    typer.Option(metavar="PATH", help="File or folder of text to score; repeatable."),
]
_Step = Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")]
_Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes of this machine, which share the work. Default: --model-processes.",
    ),
]
_ModelProcesses = Annotated[
    int,
    typer.Option(
        min=1,
        help="Processes that share one model: pipeline stages, of the run's tensor-parallel size "
        "if it divides them. For a model that does not fit one device.",
    ),
]


def evaluate(
    source: _Source,
    text: _Text = None,
    step: _Step = None,
    processes: _Processes = None,
    model_processes: _ModelProcesses = 1,
) -> None:
    """Evaluate a run's newest checkpoint, or a given checkpoint."""
    if not text:
        raise UserError("--text: name what the model is evaluated on")
    count = model_processes if processes is None else processes
    if count % model_processes:
        raise UserError(
            f"{MODEL_PROCESSES}: {model_processes} does not divide the {count} processes"
        )
    if count > 1 and not is_rank():
        from keel_megatron.inference.source import config_of

        # A mistake is reported once, not by every process.
        config_of(source, model_processes, MODEL_PROCESSES)
        sys.exit(launch(count, ["-m", "keel_megatron", *sys.argv[1:]]))
    raise UserError(f"--text: {text[0]} at step {step}: not implemented yet")
