"""`keel dashboard`: MLflow's pages over local runs, until Ctrl-C."""

from __future__ import annotations

import html
import os
import shutil
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
from keel_megatron.dashboard.merge import LARGEST, TRAINING_PAGES, MergedStore, database_bytes
from keel_megatron.dashboard.server import Server, listen, require_mlflow_server
from keel_megatron.mlflow_delivery.run_file import original_of
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_file
from keel_megatron.urls import without_credentials

REFRESH_SECONDS = 5.0
_LISTED = 20
_COPY = 1.2
"""Of a database's size: its copy, and the log of what is being copied."""
_RESERVE = 64 << 20


def serve(
    paths: Sequence[Path],
    port: int,
    *,
    open_browser: bool,
    edit: bool = False,
    names: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Serve the runs on 127.0.0.1, to this user alone, until Ctrl-C or SIGTERM.

    Args:
        paths: runs' folders, or folders of runs.
        port: 0 = any that is free.
        open_browser: open the first page.
        edit: let notes, tags and names be changed.
        names: NAME or NAME:PORT to answer under, beside 127.0.0.1 and localhost.
        say: told where the pages are, with the token that they need.

    Raises:
        UserError: there is no run to show, the port is taken, the databases' copies have no room,
            or MLflow's server does not run.
    """
    databases, elsewhere = _databases(find_runs(paths))
    for line in elsewhere:
        say(line)
    if not databases:
        raise UserError("none of these runs has a local MLflow database to show")
    require_mlflow_server()
    say(f"starting MLflow's server over {len(databases)} database(s) ...")
    with (
        _until_asked_to_end(),
        # The server removes it as well, if this process is killed.
        tempfile.TemporaryDirectory(prefix="keel-dashboard-", ignore_cleanup_errors=True) as folder,
        listen(port) as listener,
    ):
        _check_room(databases, Path(folder))
        roots = [database.parent for database in databases]
        with Server(Path(folder), listener, roots, names, edit=edit) as server:
            server.wait_until_ready()
            store = MergedStore(server.database, databases)
            _show(server, store, Path(folder), open_browser=open_browser, say=say)


def _show(
    server: Server,
    store: MergedStore,
    folder: Path,
    *,
    open_browser: bool,
    say: Callable[[str], None],
) -> None:
    """Say where the pages are, and keep them up to date."""
    told = _refresh(store, set(), say)
    pages = [(name, server.page(place)) for name, place in store.run_pages()]
    for name, page in pages[:_LISTED]:
        say(f"{name:20} {page}")
    all_runs = server.page(f"#/experiments{TRAINING_PAGES}")
    say(f"{len(pages)} run(s) at {all_runs} until Ctrl-C")
    if open_browser and pages:
        _open(folder, pages[0][1])
    while True:
        time.sleep(REFRESH_SECONDS)
        server.check()
        told = _refresh(store, told, say)


def _open(folder: Path, page: str) -> None:
    """Open a page by a file of ours: a browser's arguments, and so the token, are anybody's."""
    file = folder / "open.html"
    address = html.escape(page)
    file.write_text(f'<meta charset="utf-8"><meta http-equiv="refresh" content="0;url={address}">')
    webbrowser.open(file.as_uri())


def _check_room(databases: Sequence[Path], folder: Path) -> None:
    """See that the copies have room.

    Raises:
        UserError: they have none.
    """
    sizes = [database_bytes(database) for database in databases]
    needed = round(sum(size for size in sizes if size <= LARGEST) * _COPY) + _RESERVE
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the dashboard copies the runs' databases to {folder.parent}: {needed / 1e6:,.0f} MB "
            f"are needed, {free / 1e6:,.0f} MB are free: name fewer runs, or set TMPDIR to a "
            "folder with more room"
        )


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
        elif _is_file(path):
            found[path.resolve()] = None
        elif not os.access(run, os.R_OK | os.X_OK):
            elsewhere.append(f"{run.name} cannot be read")
        else:
            why = "tracking.mlflow is false" if tracking.get("mlflow") is False else f"no {path}"
            elsewhere.append(f"{run.name} cannot be shown: {why}")
    return list(found), elsewhere


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder of another user
        return False


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
