"""`keel checkpoint`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from keel_megatron.cli.arguments import Json, RunFolder, print_json
from keel_megatron.cli.console import print_report
from keel_megatron.cli.help import App

if TYPE_CHECKING:
    from keel_megatron.checkpoint.listing import Entry

DAMAGED = 1

app = App(help="Manage a run's checkpoints.")


@app.command("list")
def list_(run: RunFolder, as_json: Json = False) -> None:
    """List a run's checkpoints; checks only file names and sizes."""
    from keel_megatron.checkpoint.listing import entries

    _show(entries(run, read_all=False), as_json=as_json)


@app.command("verify")
def verify(run: RunFolder, as_json: Json = False) -> None:
    """Read every file of every checkpoint; exit with 1 if one is damaged."""
    from keel_megatron.checkpoint.listing import entries

    found = entries(run, read_all=True)
    _show(found, as_json=as_json)
    if any(entry.step is not None and entry.problem for entry in found):
        raise typer.Exit(DAMAGED)


@app.command("show")
def show(
    run: RunFolder,
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint's contents and the settings that a resumed run may change."""
    from keel_megatron.checkpoint.listing import as_object, describe

    if as_json:
        print_json(as_object(run, step))
        return
    print_report("\n".join(describe(run, step)))


@app.command("prune")
def prune(
    run: RunFolder,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Number of newest valid checkpoints to keep.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option(min=0, help="Also keep multiples of this many steps. 0: none.")
    ] = None,
    damaged: Annotated[
        bool,
        typer.Option(help="Also remove damaged and incomplete checkpoints."),
    ] = False,
) -> None:
    """Remove old checkpoints; unspecified options default to the run's checkpoint.* settings.

    After a recent spike or non-finite step, the newest checkpoint from before it is kept too.
    The command refuses to run while the run is training.
    """
    from keel_megatron.checkpoint.identity import saved_config
    from keel_megatron.checkpoint.listing import prune_run
    from keel_megatron.runtime import ownership

    settings = saved_config(run).checkpoint
    with ownership.take(run, "pruned"):
        removed = prune_run(
            run,
            settings.keep if keep is None else keep,
            settings.keep_every if keep_every is None else keep_every,
            damaged=damaged,
        )
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print("nothing to remove")


def _show(found: list[Entry], *, as_json: bool) -> None:
    """Print the checkpoints as a table, or as JSON."""
    from keel_megatron.checkpoint.listing import table

    if as_json:
        print_json([entry.to_json() for entry in found])
        return
    print_report("\n".join(table(found)))
