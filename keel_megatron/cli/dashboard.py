"""`keel dashboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def dashboard(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUNS]...", help="Runs' folders, or folders of runs."),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0 = any that is free.")
    ] = 5000,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the newest run's page in a browser.")
    ] = False,
) -> None:
    """Open MLflow's pages over local runs, those in runs/ if none is given; Ctrl-C ends it.

    Runs that are being trained are followed. The runs' own files are only read: what is renamed,
    noted or deleted in the pages is gone when the dashboard ends.
    """
    from keel_megatron.dashboard.serve import serve

    serve(runs or [Path("runs")], port, open_browser=open_browser)
