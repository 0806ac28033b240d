"""`keel track`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.arguments import RunFolder

app = typer.Typer(help="What a run reports to MLflow.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """What a run reports to MLflow."""


@app.command("sync")
def sync(
    run: RunFolder,
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="The address that the run reports to, to confirm it: the folder names one, and "
            "may be somebody else's. MLFLOW_TRACKING_URI confirms it, too. Not needed for the "
            "store in the run's folder.",
        ),
    ] = None,
) -> None:
    """Deliver what a crash, or a server that was down, left in a run's folder."""
    from keel_megatron.mlflow_delivery.sync import sync

    for line in sync(run, to or ()):
        print(line)
