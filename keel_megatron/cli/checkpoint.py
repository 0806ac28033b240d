"""`keel checkpoint`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.arguments import RunFolder

DAMAGED = 1

app = typer.Typer(help="Manage a run's checkpoints.", no_args_is_help=True)


@app.command("list")
def list_(run: RunFolder) -> None:
    """List a run's checkpoints; checks only file names and sizes."""
    from keel_megatron.checkpoint.listing import entries

    for entry in entries(run, read_all=False):
        print(entry.line())


@app.command("verify")
def verify(run: RunFolder) -> None:
    """Read every file of every checkpoint; exit with 1 if one is damaged."""
    from keel_megatron.checkpoint.listing import entries

    found = entries(run, read_all=True)
    for entry in found:
        print(entry.line())
    if any(entry.step is not None and entry.problem for entry in found):
        raise typer.Exit(DAMAGED)


@app.command("show")
def show(
    run: RunFolder,
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")
    ] = None,
) -> None:
    """Show a checkpoint's contents and the settings that a resumed run may change."""
    from keel_megatron.checkpoint.listing import describe

    for line in describe(run, step):
        print(line)


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
