"""What the commands of all grid studies share: their options, and what they do."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from keel_megatron.architecture.residual import RULES
from keel_megatron.cli.arguments import (
    ConfigPath,
    Json,
    Overrides,
    only_json,
    print_json,
    refuse_unused,
    sbatch_options,
)
from keel_megatron.cli.choices import listed, one_of, some_of
from keel_megatron.cli.console import print_report
from keel_megatron.config.load import load_config
from keel_megatron.config.reading import LARGE, parse_json, read_small
from keel_megatron.errors import UserError
from keel_megatron.layout.devices import DEVICES
from keel_megatron.runtime import exit_codes
from keel_megatron.studies.grid import Axes, Study, make_grid
from keel_megatron.studies.results import RESULTS

FOLDER = Path("runs/studies")
"""Parent of the studies' folders."""
Make = Callable[..., Study]
"""(configuration, axes, the command's own options) to a study."""


class Executor(StrEnum):
    """Where the runs of a grid run."""

    LOCAL = "local"
    SLURM = "slurm"


def _shared(
    config: ConfigPath,
    overrides: Overrides = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE,...",
            help="Residual rules. Default: the study's own choice.",
            **some_of(lambda: RULES),
        ),
    ] = None,
    depths: Annotated[
        list[str] | None,
        typer.Option(metavar="L,...", help="Numbers of sub-layers, even. Default: CONFIG's."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds of each point, counted from training.seed.")
    ] = 1,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at the same time, which share the CPU cores. Default: 1; all with slurm.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The study's folder. Default: runs/studies/NAME.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show the grid and its cost.")] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With --plan: predict for this device type, as keel plan --gpu does.",
            **one_of(lambda: DEVICES),
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Measure a step of each shape before the first run.")
    ] = True,
    executor: Annotated[
        Executor, typer.Option(help="local: this machine. slurm: an array of jobs.")
    ] = Executor.LOCAL,
    sbatch: Annotated[
        str, typer.Option(help="Further options of sbatch, such as '--nodes=1 --time=4:00:00'.")
    ] = "",
    as_json: Json = False,
) -> None:
    """The options of every grid study."""


@dataclass(frozen=True)
class _Options:
    """Values of the shared options."""

    config: Path
    overrides: list[str] | None
    rules: list[str] | None
    depths: list[str] | None
    seeds: int
    parallel: int | None
    out: Path | None
    plan: bool
    gpu: str | None
    measure: bool
    executor: Executor
    sbatch: str
    as_json: bool


def add_study(app: typer.Typer, name: str, make: Make) -> None:
    """Add a grid study's command.

    Its help is the docstring of `make`, its options are those of `make` after the first two
    parameters, and the shared ones.

    Args:
        app: `keel study`.
        name: the study and its command.
        make: returns the study's grid; annotated as typer wants it.
    """
    shared = inspect.signature(_shared, eval_str=True).parameters
    own = list(inspect.signature(make, eval_str=True).parameters.values())[2:]

    def command(**values: Any) -> None:
        options = _Options(**{key: values.pop(key) for key in shared})
        sys.exit(_run(name, make, options, values))

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*shared.values(), *own)
    ]
    command.__doc__ = make.__doc__
    command.__annotations__ = get_type_hints(_shared, include_extras=True) | {
        parameter.name: parameter.annotation for parameter in own
    }
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(name)(command)


def whole_numbers(option: str, values: Collection[str]) -> list[int]:
    """The values of an option as integers.

    Raises:
        UserError: one is not an integer.
    """
    for value in values:
        if not value.isdecimal():
            raise UserError(f"{option}: {value!r} must be a whole number")
    return [int(value) for value in values]


def numbers(option: str, values: Collection[str]) -> tuple[float, ...]:
    """The values of an option as finite numbers.

    Raises:
        UserError: one is not a finite number.
    """
    found = []
    for value in values:
        try:
            found.append(float(value))
        except ValueError:
            raise UserError(f"{option}: {value!r} must be a number") from None
        if not math.isfinite(found[-1]):
            raise UserError(f"{option}: {value!r} must be a finite number")
    return tuple(found)


def print_results(out: Path) -> None:
    """Print a study's results.json; null if there is no result yet."""
    path = out / RESULTS
    print_json(parse_json(read_small(path, LARGE)) if path.is_file() else None)


def _run(name: str, make: Make, options: _Options, own: dict[str, Any]) -> int:
    """Make a study's grid and run it; the exit code."""
    from keel_megatron.studies.conduct import run_here, run_on_cluster
    from keel_megatron.studies.cost import cost_of

    local = options.executor is Executor.LOCAL
    if local:
        refuse_unused(options.executor, sbatch=options.sbatch)
    submission = sbatch_options(options.sbatch)
    overrides = tuple(options.overrides or ())
    config = load_config(options.config, overrides)
    depths = tuple(whole_numbers("--depths", listed(options.depths)))
    axes = Axes(listed(options.rules), depths or (config.model.sub_layers,))
    study = make(config, axes, **own)
    out = options.out or FOLDER / name
    # A run on SLURM has its nodes to itself.
    share = (options.parallel or 1) if local else 0
    grid = make_grid(
        study, options.config, overrides, out, options.seeds, share, to_start=not options.plan
    )
    parallel = options.parallel or (1 if local else len(grid.runs))
    if options.plan:
        with only_json(options.as_json):
            cost = cost_of(grid, parallel, options.gpu)
            print_report(cost.describe())
        if options.as_json:
            print_json(cost.as_object())
        return exit_codes.DONE
    if options.gpu is not None:
        raise UserError("--gpu: only --plan predicts for a device type")
    with only_json(options.as_json):
        if local:
            code = run_here(grid, parallel, measure=options.measure)
        else:
            code = run_on_cluster(grid, parallel, submission)
    if options.as_json:
        print_results(out)
    return code
