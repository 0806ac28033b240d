"""MLflow's own server as a child process on loopback."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from keel_megatron.config.errors import UserError
from keel_megatron.tracking.sqlite_uri import sqlite_uri

HOST = "127.0.0.1"
_START_SECONDS = 120.0
_POLL_SECONDS = 0.2
_LEAVE_SECONDS = 10.0


def require_mlflow_server() -> None:
    """See that MLflow's server is installed, not its client alone.

    Raises:
        UserError: it is not; with the command that installs it.
    """
    if any(importlib.util.find_spec(name) is None for name in ("mlflow", "flask")):
        raise UserError(
            "MLflow's server is not installed: pip install -c constraints.txt -e '.[dashboard]'"
        )


def free_port(port: int) -> int:
    """The port, seen to be free; for 0 any that is.

    Raises:
        UserError: it is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"--port: {port} on {HOST} cannot be had ({error.strerror}); give another one, "
                "or 0 for any that is free"
            ) from None
        return int(probe.getsockname()[1])


class Server:
    """The server over a database; a context manager that ends it.

    Args:
        folder: for the server's own files: mlflow.db, which it makes, and server.log.
        port: of 127.0.0.1.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.database = folder / "mlflow.db"
        self.url = f"http://{HOST}:{port}"
        self._log = folder / "server.log"
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", sqlite_uri(self.database)]
        command += ["--default-artifact-root", str(folder / "artifacts")]
        quiet = {
            # Pages that are looked at on this machine tell MLflow's makers nothing.
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | quiet,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, who then end it
            )

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            UserError: it ended, or did not answer; with the end of its log.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(_POLL_SECONDS)
        raise UserError(f"MLflow's server does not answer at {self.url}:\n{self._last_lines()}")

    def check(self) -> None:
        """See that it still runs.

        Raises:
            UserError: it has ended.
        """
        if self._process.poll() is not None:
            raise UserError(f"MLflow's server has ended:\n{self._last_lines()}")

    def close(self) -> None:
        """End it, and the processes that it has started."""
        for sign, patience in ((signal.SIGTERM, _LEAVE_SECONDS), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)

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
