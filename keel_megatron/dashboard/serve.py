"""`keel dashboard`: MLflow's pages over local runs, until Ctrl-C."""

from __future__ import annotations

import html
import shutil
import signal
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from keel_megatron.dashboard.folders import find_runs
from keel_megatron.dashboard.server import TRAINING_PAGES, Server, listen, require_mlflow_server
from keel_megatron.dashboard.shown import Shown, choose, fill
from keel_megatron.errors import UserError
from keel_megatron.mlflow_delivery.database import NAME, DatabaseError, copy_foreign
from keel_megatron.mlflow_delivery.filesystem import network_filesystem
from keel_megatron.mlflow_delivery.target import remembered_run_id

CHECK_SECONDS = 5.0
FILL_SECONDS = 30.0
"""Seconds between deliveries to a database on a network file system."""
_LISTED = 20
_RESERVE = 64 << 20


def serve(
    paths: Sequence[Path],
    port: int,
    *,
    open_browser: bool,
    names: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Serve the runs' database on 127.0.0.1, to this user alone, until Ctrl-C or SIGTERM.

    Args:
        paths: runs' folders, or folders of runs.
        port: 0: any free port.
        open_browser: open the first page in a browser.
        names: additional host names, NAME or NAME:PORT, besides 127.0.0.1 and localhost.
        say: called with the pages' addresses, which contain the token.

    Raises:
        UserError: there is no run to show, the port is in use, or MLflow's server does not run.
    """
    require_mlflow_server()
    shown = choose(find_runs(paths))
    for line in shown.others:
        say(line)
    foreign = shown.foreign
    with (
        _until_asked_to_end(),
        # The server removes it as well, if this process is killed.
        tempfile.TemporaryDirectory(prefix="keel-dashboard-", ignore_cleanup_errors=True) as folder,
        listen(port) as listener,
    ):
        database = shown.database
        if foreign is None:
            fill(shown.runs, say)
        else:
            database = _copy(shown.database, Path(folder))
            say(f"{shown.database} {foreign}: a copy is shown, as it is now and read-only")
        say(f"starting MLflow's server over {shown.database} ...")
        with Server(
            Path(folder),
            listener,
            database,
            runs_dir=shown.database.parent,
            roots=shown.runs,
            names=names,
            edit=foreign is None,
        ) as server:
            server.wait_until_ready()
            first = _show(server, shown, say)
            if open_browser and first is not None:
                _open(Path(folder), first)
            _watch(server, shown, say, fills=foreign is None)


def _show(server: Server, shown: Shown, say: Callable[[str], None]) -> str | None:
    """Print the pages' addresses and open the newest run's page."""
    ids = [remembered_run_id(run) for run in shown.runs]
    found = [server.run_page(run_id) for run_id in ids if run_id is not None]
    pages = sorted((page for page in found if page is not None), reverse=True)
    for _start, name, page in pages[:_LISTED]:
        say(f"{name:20} {page}")
    all_runs = server.page(f"#/experiments{TRAINING_PAGES}")
    say(f"{len(pages)} run(s) at {all_runs} until Ctrl-C")
    return pages[0][2] if pages else None


def _watch(server: Server, shown: Shown, say: Callable[[str], None], *, fills: bool) -> None:
    """Wait, and deliver the reports of runs on a network file system meanwhile."""
    told: set[str] = set()

    def say_once(line: str) -> None:
        if line not in told:
            told.add(line)
            say(line)

    fills = fills and network_filesystem(shown.database.parent) is not None
    filled = time.monotonic()
    while True:
        time.sleep(CHECK_SECONDS)
        server.check()
        if fills and time.monotonic() >= filled + FILL_SECONDS:
            fill(find_runs([shown.database.parent]), say_once)
            filled = time.monotonic()


def _copy(database: Path, folder: Path) -> Path:
    """A copy of another user's database in a private folder.

    Raises:
        UserError: it cannot be read, or there is not enough disk space.
    """
    copy = folder / NAME
    try:
        size, free = database.stat().st_size, shutil.disk_usage(folder).free
        if size + _RESERVE > free:
            raise UserError(
                f"{database} is another user's and is copied to {folder.parent}: "
                f"{(size + _RESERVE) / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free: set "
                "TMPDIR to a folder with more space"
            )
        copy_foreign(database, copy)
    except (OSError, DatabaseError) as error:
        raise UserError(
            f"{database} is another user's and cannot be shown: {error}. Its user can show it, or "
            "report to a server (tracking.uri)"
        ) from error
    return copy


def _open(folder: Path, page: str) -> None:
    """Open a page through a private file: other users can read a browser's arguments."""
    file = folder / "open.html"
    address = html.escape(page)
    file.write_text(f'<meta charset="utf-8"><meta http-equiv="refresh" content="0;url={address}">')
    webbrowser.open(file.as_uri())


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
