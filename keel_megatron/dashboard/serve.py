"""`keel dashboard`: MLflow's pages over local runs, until Ctrl-C."""

from __future__ import annotations

import signal
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from keel_megatron.config.errors import UserError
from keel_megatron.dashboard.folders import find_runs, saved_settings
from keel_megatron.dashboard.merge import TRAINING_PAGES, MergedStore
from keel_megatron.dashboard.server import Server, free_port, require_mlflow_server
from keel_megatron.tracking.run_file import original_of
from keel_megatron.tracking.sqlite_uri import sqlite_file
from keel_megatron.tracking.target import without_credentials

REFRESH_SECONDS = 5.0
_LISTED = 20


def serve(
    paths: Sequence[Path], port: int, *, open_browser: bool, say: Callable[[str], None] = print
) -> None:
    """Serve the runs on 127.0.0.1 until Ctrl-C or SIGTERM.

    Args:
        paths: runs' folders, or folders of runs.
        port: 0 = any that is free.
        open_browser: open the first page.
        say: told where the pages are.

    Raises:
        UserError: there is no run to show, the port is taken, or MLflow's server does not run.
    """
    databases, elsewhere = _databases(find_runs(paths))
    for line in elsewhere:
        say(line)
    if not databases:
        raise UserError("none of these runs has a local MLflow database to show")
    require_mlflow_server()
    chosen = free_port(port)
    say(f"starting MLflow's server over {len(databases)} database(s) ...")
    with (
        _until_asked_to_end(),
        tempfile.TemporaryDirectory(prefix="keel-dashboard-") as folder,
        Server(Path(folder), chosen) as server,
    ):
        server.wait_until_ready()
        store = MergedStore(server.database, databases)
        told = _refresh(store, set(), say)
        pages = [(name, f"{server.url}/{page}") for name, page in store.run_pages()]
        for name, page in pages[:_LISTED]:
            say(f"{name:20} {page}")
        say(f"{len(pages)} run(s) at {server.url}/#/experiments{TRAINING_PAGES} until Ctrl-C")
        if open_browser and pages:
            webbrowser.open(pages[0][1])
        while True:
            time.sleep(REFRESH_SECONDS)
            server.check()
            told = _refresh(store, told, say)


def _refresh(store: MergedStore, told: set[str], say: Callable[[str], None]) -> set[str]:
    """Copy what is new; say once what cannot be read."""
    problems = set(store.refresh())
    for line in sorted(problems - told):
        say(f"cannot read {line}; it is tried again")
    return problems | told


def _databases(runs: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The sqlite files of runs, each once, and a line for every run that has none here."""
    found: dict[Path, None] = {}
    elsewhere = []
    for run in runs:
        tracking = saved_settings(run).get("tracking", {})
        uri = tracking.get("uri")
        path = run / "mlflow.db" if uri is None else sqlite_file(str(uri))
        original = original_of(run)
        if original is not None:
            elsewhere.append(f"{run.name} is a copy of {original} that was not started yet")
        elif path is None:
            elsewhere.append(f"{run.name} reports to {without_credentials(str(uri))}: look there")
        elif path.is_file():
            found[path.resolve()] = None
        else:
            why = "tracking.mlflow is false" if tracking.get("mlflow") is False else f"no {path}"
            elsewhere.append(f"{run.name} cannot be shown: {why}")
    return list(found), elsewhere


@contextmanager
def _until_asked_to_end() -> Iterator[None]:
    """End quietly on Ctrl-C, SIGTERM and SIGHUP."""

    def end(_sign: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {sign: signal.signal(sign, end) for sign in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
