"""`keel depth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.cli.arguments import RunFolder


def depth(
    run: RunFolder,
    quantity: Annotated[
        str | None, typer.Option(help="One quantity, such as gradient_norm, in detail.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="The step to show beside the first; the latest if not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pictures; the run's if not given.")
    ] = None,
) -> None:
    """Show what every depth of a run was like: a table, and pictures over depth and steps."""
    from keel_megatron.depth.profile import not_noted, read_profiles
    from keel_megatron.depth.table import draw, select, table

    profiles = read_profiles(run)
    shown = select(profiles, quantity, step)
    print(table(profiles[0], shown, quantity))
    gap = not_noted(profiles)
    if gap is not None:
        print(gap)
    for picture in draw(profiles, shown, quantity, run.resolve().name, out or run):
        print(picture)
