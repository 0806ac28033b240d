"""`keel bench`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keel_megatron.cli.arguments import (
    ConfigPath,
    Json,
    Overrides,
    check_outputs,
    only_json,
    print_json,
)
from keel_megatron.cli.console import print_report
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_output
from keel_megatron.runtime.json_text import json_text
from keel_megatron.runtime.local_launch import launch
from keel_megatron.runtime.processes import is_rank, with_processes

if TYPE_CHECKING:
    from keel_megatron.bench.step_bench import Bench


_Profile = Annotated[
    Path | None, typer.Option(help="File for a torch trace of one step (.json or .json.gz).")
]
_Out = Annotated[Path | None, typer.Option(metavar="FILE", help="File for the results, as JSON.")]


def bench(
    config: ConfigPath,
    overrides: Overrides = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=A,B", help="Compare values of a setting, e.g. model.residual=pre_ln,keel."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=4, help="Timed steps per variant.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Untimed steps before them.")] = 3,
    random_tokens: Annotated[
        bool,
        typer.Option("--random-tokens", help="Use random tokens instead of the training data."),
    ] = False,
    profile: _Profile = None,
    out: _Out = None,
    as_json: Json = False,
    processes: Annotated[
        int,
        typer.Option(min=0, help="Number of processes to start on this machine. 0: as keel train."),
    ] = 0,
) -> None:
    """Time the parts of a training step.

    Each part is compared with the device's roofline. Nothing is saved. Several processes:
    --processes N on this machine, or torchrun ... -m keel_megatron bench CONFIG on one or many
    machines.
    """
    check_outputs({"--out": out, "--profile": profile})
    settings = list(overrides or ())
    if processes or not is_rank():
        _, processes = with_processes(config, tuple(settings), processes)
    if processes > 1:
        options = _options(steps=steps, warmup=warmup, compare=compare, profile=profile)
        options += _options(out=out, json=as_json, random_tokens=random_tokens)
        command = ["-m", "keel_megatron", "bench", str(config), *settings, *options]
        sys.exit(launch(processes, command))
    from keel_megatron.bench.step_bench import run_bench

    with tempfile.TemporaryDirectory(prefix="keel-bench-") as folder:
        trace = profile and Path(folder) / profile.name
        with only_json(as_json):
            result = run_bench(
                config,
                settings,
                compare,
                warmup=warmup,
                steps=steps,
                random_tokens=random_tokens,
                profile=trace,
            )
        if result is not None:
            _report(result, out, as_json=as_json)
            if profile and trace:
                _write_trace(trace, profile)


def _report(result: Bench, out: Path | None, *, as_json: bool) -> None:
    """Print the results, and write them to the file of --out."""
    if as_json:
        print_json(result.figures)
    else:
        print_report("\n".join(result.lines))
    if out is not None:
        write_output("--out", out, json_text(result.figures) + "\n")


def _write_trace(trace: Path, profile: Path) -> None:
    """Write the exported trace to the file of --profile.

    torch replaces whatever has the name that it exports to, and reports a failure only in its log.

    Raises:
        UserError: there is no trace, or the file cannot be written.
    """
    if not trace.is_file():
        raise UserError(f"--profile: {profile} is not written: torch has exported no trace")
    write_output("--profile", profile, trace.read_bytes())


def _options(**given: object) -> list[str]:
    """Options as command-line arguments, without those that were not given."""
    found = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(option)
        elif value is not None and value is not False:
            found += [option, str(value)]
    return found
