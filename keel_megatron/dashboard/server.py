"""MLflow's own server as a child process on loopback, behind the gate."""

from __future__ import annotations

import importlib.util
import json
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from keel_megatron.dashboard.gate import COOKIE
from keel_megatron.dashboard.server_process import Settings, environment
from keel_megatron.errors import UserError

HOST = "127.0.0.1"
_START_SECONDS = 120.0
_POLL_SECONDS = 0.2
_LEAVE_SECONDS = 10.0
_ANSWER_SECONDS = 60.0
TRAINING_PAGES = "?workflowType=machine_learning"
"""MLflow's pages for training rather than for language model applications."""


def require_mlflow_server() -> None:
    """Check that MLflow's server is installed, not only its client.

    Raises:
        UserError: it is not; the message has the command that installs it.
    """
    wanted = ("mlflow", "flask", "fastapi", "uvicorn")
    if any(importlib.util.find_spec(name) is None for name in wanted):
        raise UserError(
            "MLflow's server is not installed: pip install -c constraints.txt -e '.[dashboard]'"
        )


def listen(port: int) -> socket.socket:
    """A socket that listens on a port of 127.0.0.1; 0: any free port.

    The server inherits it, so that no other process can take the port.

    Raises:
        UserError: the port is in use.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(
            f"--port: {port} on {HOST} is not available ({error.strerror}); give another port, "
            "or 0 for any free one"
        ) from None
    return listener


class Server:
    """The server over a database; a context manager that ends it.

    Args:
        folder: for the server's own files, such as server.log. The server removes it if this
            process is killed.
        listener: socket from `listen`; owned by the server from now on.
        database: the database to serve.
        runs_dir: files of the runs in this folder are served.
        roots: further runs' folders whose files are served.
        names: host names to answer to, besides 127.0.0.1 and localhost.
        edit: whether notes, tags and names can be changed.
    """

    def __init__(
        self,
        folder: Path,
        listener: socket.socket,
        database: Path,
        *,
        runs_dir: Path,
        roots: Sequence[Path],
        names: Sequence[str] = (),
        edit: bool,
    ) -> None:
        port = listener.getsockname()[1]
        self._token = secrets.token_urlsafe(24)
        self._url = f"http://{HOST}:{port}/"
        # Not through a proxy, which would learn the token.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._log = folder / "server.log"
        hosts = [f"{name}:{port}" for name in (HOST, "localhost")]
        hosts += [name if ":" in name else f"{name}:{port}" for name in names]
        settings = Settings(
            folder=str(folder),
            database=str(database.resolve()),
            runs_dir=str(runs_dir.resolve()),
            listener=listener.fileno(),
            token=self._token,
            hosts=hosts,
            roots=[str(root.resolve()) for root in roots],
            edit=edit,
        )
        with self._log.open("w") as log, listener:
            self._process = subprocess.Popen(
                # -P: no module from the working directory, which may be untrusted
                [sys.executable, "-P", "-m", "keel_megatron.dashboard.server_process"],
                env=environment(),
                stdin=subprocess.PIPE,  # its end tells the server that we are gone
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C reaches us alone, who then end it
            )
        assert self._process.stdin is not None
        self._input = self._process.stdin
        with suppress(BrokenPipeError):  # it has ended: `check` says so
            self._input.write(settings.to_line())
            self._input.flush()

    def page(self, place: str = "") -> str:
        """The address of a page, with the token.

        Args:
            place: the rest of the address, from `#` on.
        """
        return f"{self._url}?token={self._token}{place}"

    def run_page(self, run_id: str) -> tuple[int, str, str] | None:
        """Start (ms since 1970), name and page of an MLflow run; None if it does not exist."""
        path = f"ajax-api/2.0/mlflow/runs/get?run_id={run_id}"
        request = urllib.request.Request(self._url + path)
        port = self._url.rstrip("/").rpartition(":")[2]
        request.add_header("Cookie", f"{COOKIE}{port}={self._token}")
        with suppress(OSError, ValueError, KeyError):
            with self._opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                info = json.load(answer)["run"]["info"]
            place = f"#/experiments/{info['experiment_id']}/runs/{run_id}{TRAINING_PAGES}"
            if info["lifecycle_stage"] == "active":
                return int(info["start_time"]), str(info["run_name"]), self.page(place)
        return None

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            UserError: it ended, or did not answer; with the end of its log.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with suppress(OSError), self._opener.open(self.page(), timeout=5):
                return
            time.sleep(_POLL_SECONDS)
        raise UserError(
            f"MLflow's server does not answer at {self._url} within {_START_SECONDS:g} s. On a "
            f"busy machine it may need longer: try again. The end of its log:\n{self._last_lines()}"
        )

    def check(self) -> None:
        """Check that it still runs.

        Raises:
            UserError: it has ended.
        """
        if self._process.poll() is not None:
            raise UserError(f"MLflow's server has ended:\n{self._last_lines()}")

    def close(self) -> None:
        """End it."""
        for sign, patience in ((signal.SIGTERM, _LEAVE_SECONDS), (signal.SIGKILL, None)):
            self._process.send_signal(sign)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                break
        with suppress(BrokenPipeError):
            self._input.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-12:])
