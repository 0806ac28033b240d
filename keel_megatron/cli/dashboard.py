"""`keel dashboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def dashboard(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUNS]...",
            help="Folders of runs, or folders that contain runs. Default: runs/.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1. 0: any free port.")
    ] = 5000,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the newest run's page in a browser.")
    ] = False,
    edit: Annotated[
        bool,
        typer.Option("--edit", help="Allow edits of notes, tags and names."),
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PORT]",
            help="Additional host name to answer to, besides 127.0.0.1 and localhost. Repeatable.",
        ),
    ] = None,
) -> None:
    """Open MLflow's pages over local runs, those in runs/ if none is given; Ctrl-C ends it.

    The pages are for whoever has the address that is printed: it holds a token, a new one each
    time. Runs that are being trained are followed. The runs' own files are only read: what --edit
    lets be changed is gone when the dashboard ends.
    """
    from keel_megatron.dashboard.serve import serve

    serve(
        runs or [Path("runs")],
        port,
        open_browser=open_browser,
        edit=edit,
        names=allowed_host or (),
    )
