"""`keel export`."""

from __future__ import annotations

import os
import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DIFFERENT = 1


class WeightType(StrEnum):
    """Data type of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"


def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run, runs/NAME, or of a checkpoint."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write; must not exist, or be empty.")
    ],
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")
    ] = None,
    dtype: Annotated[
        WeightType,
        typer.Option(help="Data type of the weights. Norm weights are always fp32."),
    ] = WeightType.fp32,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare the logits, computed by transformers, with the run's own.",
        ),
    ] = True,
) -> None:
    """Write a checkpoint as a Hugging Face folder.

    Exits with 1 if the logits of the exported model differ from the run's.
    """
    from keel_megatron.inference.export import export_run

    target = Path(os.path.abspath(out))
    if not export_run(run, target, step=step, dtype=dtype.value, check=check, say=print):
        raise typer.Exit(DIFFERENT)
    print(f"use it: keel generate {shlex.quote(str(out))} --prompt TEXT; {out / 'README.md'}")
