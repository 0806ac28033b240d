"""`keel study redundancy`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from keel_megatron.cli.arguments import writing
from keel_megatron.runtime.local_launch import launch
from keel_megatron.runtime.processes import is_rank
from keel_megatron.studies.results import PICTURE, RESULTS, TABLE

RUN = "KEEL_STUDY_RUN"
"""Variable with the position of the run that a group of processes measures."""


_Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or of checkpoints.")
]
_Unit = Annotated[Literal["sub-layer", "block"], typer.Option(help="Unit to remove.")]
_Removal = Annotated[
    Literal["sub-layer", "branch"],
    typer.Option(
        help="How to remove it. sub-layer: x' = x, without its norm, as in pruning. branch: x' = "
        "N_out(alpha x), with a zero branch. The same for pre_ln."
    ),
]
_Tokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of the text. Default: those of a validation, up to 65,536."),
]
_Text = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Text to use instead of the validation sets."),
]
_BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Sequences per batch, counting all removals. Default: 8,192 tokens."),
]
_Step = Annotated[int | None, typer.Option(help="Step of the checkpoints. Default: the newest.")]
_Processes = Annotated[
    int,
    typer.Option(
        min=1,
        help="Processes that share a model, as pipeline stages (with the run's tensor-parallel "
        "size if it divides them).",
    ),
]


def redundancy(
    runs: _Runs,
    unit: _Unit = "sub-layer",
    removal: _Removal = "sub-layer",
    tokens: _Tokens = None,
    text: _Text = None,
    batch_size: _BatchSize = None,
    step: _Step = None,
    processes: _Processes = 1,
    out: Annotated[Path, typer.Option(help="The study's folder.")] = Path(
        "runs/studies/redundancy"
    ),
) -> None:
    """Measure the loss of trained runs without each sub-layer or block."""
    from keel_megatron.inference.source import config_of
    from keel_megatron.studies.redundancy.measure import Options, measure

    seeds = [config_of(run, processes).training.seed for run in runs]
    options = Options(unit, removal, tokens, batch_size, step, text, seeds[0], processes)
    if processes > 1 and is_rank():
        # Of this command's own launcher, which starts a group for each run; or of torchrun.
        for run in [runs[int(os.environ[RUN])]] if RUN in os.environ else runs:
            measure(run, out, options)
        if RUN in os.environ or os.environ["RANK"] != "0":
            return
    elif processes > 1:
        for number in range(len(runs)):
            command = ["-m", "keel_megatron", *sys.argv[1:]]
            if code := launch(processes, command, variables={RUN: str(number)}):
                sys.exit(code)
    # What a group of processes has measured is found, not measured again.
    subjects = [measure(run, out, replace(options, processes=1)) for run in runs]
    from keel_megatron.studies.redundancy.outcome import outcomes
    from keel_megatron.studies.redundancy.report import write_report

    with writing("--out", out):
        print(write_report(outcomes(subjects, out), out))
    print(f"\n{out / RESULTS}, {out / TABLE}, {out / PICTURE}")
