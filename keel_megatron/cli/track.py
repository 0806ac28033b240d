"""`keel track`."""

from __future__ import annotations

import typer

from keel_megatron.cli.arguments import RunFolder

app = typer.Typer(help="What a run reports to MLflow.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """What a run reports to MLflow."""


@app.command("sync")
def sync(run: RunFolder) -> None:
    """Deliver what a crash, or a server that was down, left in a run's folder."""
    from keel_megatron.tracking.sync import sync

    for line in sync(run):
        print(line)
