"""Arguments that commands share."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from keel_megatron.cli.completion import configurations, settings
from keel_megatron.config.renamed import notices
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import check_output
from keel_megatron.runtime.json_text import json_text


def show_old_names(context: typer.Context, path: Path | None) -> Path | None:
    """Print a notice for each renamed setting in a configuration file."""
    _print_notices(context, path, ())
    return path


def _show_old_overrides(context: typer.Context, overrides: list[str] | None) -> list[str] | None:
    """Print a notice for each renamed setting in the overrides."""
    _print_notices(context, None, overrides or ())
    return overrides


def _print_notices(context: typer.Context, path: Path | None, overrides: Sequence[str]) -> None:
    # Once per run: not by the processes that `keel train` starts, nor by ranks other than 0.
    if context.resilient_parsing:  # a shell completes the command
        return
    if "KEEL_LAUNCHER_PID" in os.environ or os.environ.get("RANK", "0") != "0":
        return
    printed = context.meta.setdefault("keel_megatron.notices", set())
    for notice in notices(path, overrides):
        if notice not in printed:
            print(f"notice: {notice}", file=sys.stderr)
            printed.add(notice)


ConfigPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file of the run's configuration, or a name of `keel config list`.",
        callback=show_old_names,
        autocompletion=configurations,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Settings that replace those of the file.",
        callback=_show_old_overrides,
        autocompletion=settings,
    ),
]
ModelFolder = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Folder of a run, runs/NAME, or of a checkpoint; or a Hugging Face folder.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON value instead of text; messages go to stderr."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: runs/NAME.")]


def sbatch_options(text: str) -> list[str]:
    """The words of --sbatch.

    Raises:
        UserError: a quotation is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--sbatch: {text}: {error}") from None


def refuse_unused(executor: str, **options: object) -> None:
    """Refuse options that are given and that this executor does not use.

    Raises:
        UserError: there are some.
    """
    if given := [f"--{name}" for name, value in options.items() if value]:
        raise UserError(
            f"{', '.join(given)}: no effect with --executor {executor}; give --executor slurm"
        )


@contextmanager
def only_json(as_json: bool) -> Iterator[None]:
    """Context in which everything that is printed goes to stderr, if `as_json`."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_json(value: Any) -> None:
    """Print the JSON of a command's `--json`."""
    print(json_text(value), flush=True)


def check_outputs(given: Mapping[str, Path | None]) -> None:
    """Check the files that options name, on the rank that writes them, before the work starts.

    Args:
        given: the file of each option; None: the option is not given.

    Raises:
        UserError: one cannot be written.
    """
    for option, path in given.items():
        if path is not None and os.environ.get("RANK", "0") == "0":
            check_output(option, path)


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Report an error while writing an option's file as the user's.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written: {error.strerror}") from error
