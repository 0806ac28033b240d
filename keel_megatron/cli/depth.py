"""`keel depth`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.cli.arguments import Json, RunFolder, only_json, print_json
from keel_megatron.cli.choices import one_of
from keel_megatron.cli.console import print_report


def _quantities() -> Collection[str]:
    from keel_megatron.depth.profile import QUANTITIES

    return QUANTITIES


def depth(
    run: RunFolder,
    quantity: Annotated[
        str | None,
        typer.Option(help="Show only this quantity, such as gradient_norm.", **one_of(_quantities)),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step to compare with the first. Default: the latest.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures. Default: the run's folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show statistics of every sub-layer: a table and pictures.

    The pictures show them over depth and steps.
    """
    from keel_megatron.depth.profile import not_recorded, read_profiles
    from keel_megatron.depth.table import as_object, draw, select, table

    profiles = read_profiles(run)
    shown = select(profiles, quantity, step)
    with only_json(as_json):
        print_report(table(profiles[0], shown, quantity))
        gap = not_recorded(profiles)
        if gap is not None:
            print_report(gap)
        pictures = draw(profiles, shown, quantity, run.resolve().name, out or run)
        for picture in pictures:
            print(picture)
    if as_json:
        print_json(as_object(profiles[0], shown, quantity) | {"pictures": [*map(str, pictures)]})
