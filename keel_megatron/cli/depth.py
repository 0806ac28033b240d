"""`keel depth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.cli.arguments import RunFolder


def depth(
    run: RunFolder,
    quantity: Annotated[
        str | None, typer.Option(help="Show only this quantity, such as gradient_norm.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step to compare with the first. Default: the latest.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures. Default: the run's folder.")
    ] = None,
) -> None:
    """Show per-layer statistics of a run: a table, and pictures over depth and steps."""
    from keel_megatron.depth.profile import not_recorded, read_profiles
    from keel_megatron.depth.table import draw, select, table

    profiles = read_profiles(run)
    shown = select(profiles, quantity, step)
    print(table(profiles[0], shown, quantity))
    gap = not_recorded(profiles)
    if gap is not None:
        print(gap)
    for picture in draw(profiles, shown, quantity, run.resolve().name, out or run):
        print(picture)
