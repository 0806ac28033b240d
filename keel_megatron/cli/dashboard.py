"""`keel dashboard`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def dashboard(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUNS",
            help="Folders of runs, or folders that contain runs. Default: runs/.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1. 0: any free port.")
    ] = 5000,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the newest run's page in a browser.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PORT]",
            help="Additional host name to answer to, besides 127.0.0.1 and localhost. Repeatable.",
        ),
    ] = None,
) -> None:
    """Serve MLflow's pages of local runs, until Ctrl-C.

    It runs `mlflow server` on the runs' database, runs/mlflow.db. The printed address contains a
    token, new at each start; without it nobody can open the pages. Only notes, tags and names can
    be changed. Metrics that runs have not delivered yet are delivered first.
    """
    from keel_megatron.dashboard.serve import serve

    serve(
        runs or [Path("runs")],
        port,
        open_browser=open_browser,
        names=allowed_host or (),
    )
