"""`keel study redundancy`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from keel_megatron.cli.arguments import Json, only_json, writing
from keel_megatron.cli.studies.grid import print_results
from keel_megatron.runtime.local_launch import launch
from keel_megatron.runtime.processes import is_rank
from keel_megatron.studies.results import PICTURE, RESULTS, TABLE

if TYPE_CHECKING:
    from keel_megatron.studies.redundancy.measure import Options

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
    as_json: Json = False,
) -> None:
    """Measure the loss of trained runs without each sub-layer or block."""
    from keel_megatron.inference.source import config_of
    from keel_megatron.studies.redundancy.measure import Options

    seeds = [config_of(run, processes).training.seed for run in runs]
    options = Options(unit, removal, tokens, batch_size, step, text, seeds[0], processes)
    with only_json(as_json):
        reports = _measure(runs, out, options)
        if reports:
            _report(runs, out, options)
    if reports and as_json:
        print_results(out)


def _measure(runs: list[Path], out: Path, options: Options) -> bool:
    """Measure with several processes, if there are to be; whether this process reports."""
    from keel_megatron.studies.redundancy.measure import measure

    if options.processes > 1 and is_rank():
        # Of this command's own launcher, which starts a group for each run; or of torchrun.
        for run in [runs[int(os.environ[RUN])]] if RUN in os.environ else runs:
            measure(run, out, options)
        return RUN not in os.environ and os.environ["RANK"] == "0"
    for number in range(len(runs)) if options.processes > 1 else ():
        command = ["-m", "keel_megatron", *sys.argv[1:]]
        if code := launch(options.processes, command, variables={RUN: str(number)}):
            sys.exit(code)
    return True


def _report(runs: list[Path], out: Path, options: Options) -> None:
    """Measure what is not measured yet, and write and print the results."""
    from keel_megatron.studies.redundancy.measure import measure
    from keel_megatron.studies.redundancy.outcome import outcomes
    from keel_megatron.studies.redundancy.report import write_report

    # What a group of processes has measured is found, not measured again.
    subjects = [measure(run, out, replace(options, processes=1)) for run in runs]
    with writing("--out", out):
        text = write_report(outcomes(subjects, out), out)
    print(text)
    print(f"\n{out / RESULTS}, {out / TABLE}, {out / PICTURE}")
