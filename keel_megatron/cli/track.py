"""`keel track`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.arguments import RunFolder
from keel_megatron.cli.help import App

app = App(help="Deliver a run's metrics to MLflow.")


@app.callback()
def _group() -> None:
    """Deliver a run's metrics to MLflow."""


@app.command("sync")
def sync(
    run: RunFolder,
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI",
            help="Confirm the run's tracking URI: its folder may come from someone else, so the "
            "address in it is not trusted. MLFLOW_TRACKING_URI confirms it too. Not needed for a "
            "local store.",
        ),
    ] = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Upload the whole run again, from its log. Tags and notes in MLflow are kept.",
        ),
    ] = False,
) -> None:
    """Upload the metrics that a crash or an unreachable server left in a run's folder."""
    from keel_megatron.mlflow_delivery.sync import sync

    for line in sync(run, to or (), rebuild=rebuild):
        print(line)
