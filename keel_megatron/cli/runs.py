"""`keel runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.cli.arguments import Json, print_json


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUNS",
            help="Folders of runs, or folders that contain runs. Default: runs/.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs: state, step, loss, speed, time left and problems."""
    import sys

    from keel_megatron.config.terminal import has_colours, trusted
    from keel_megatron.dashboard.folders import find_runs
    from keel_megatron.dashboard.runs import look

    found = look(find_runs(folders or [Path("runs")]))
    if as_json:
        print_json([run.to_json() for run in found])
        return
    from rich.console import Console

    from keel_megatron.dashboard.runs_table import runs_table
    from keel_megatron.runtime.tables import UNLIMITED

    # A pipe has no width: a line a run, to grep in.
    width = None if sys.stdout.isatty() else UNLIMITED
    coloured = has_colours(sys.stdout)
    console = Console(
        file=trusted(sys.stdout),
        highlight=False,
        width=width,
        force_terminal=coloured,
        color_system="auto" if coloured else None,
    )
    console.print(runs_table(found))
