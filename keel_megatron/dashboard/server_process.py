"""MLflow's server behind the gate: the process that `server.py` starts.

It reads its settings, the token among them, as one line of JSON from its standard input: neither
the list of processes nor an environment shows them. That input stays open as long as the dashboard
lives; when it ends, however that came about, this process removes the dashboard's folder and ends.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from keel_megatron.dashboard.artifacts import ArtifactFolders
from keel_megatron.dashboard.gate import Gate
from keel_megatron.mlflow_delivery.database import prepare
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_uri

_REMOVALS = 5
_GOODBYE_SECONDS = 1


@dataclass(frozen=True)
class Settings:
    """Settings of the server."""

    folder: str
    """Its own, which goes when it ends."""
    database: str
    """The user's, or a copy in `folder` of another user's."""
    runs_dir: str
    """The folder of the original database; files of the runs in it are served."""
    listener: int
    """Descriptor of the listening socket."""
    token: str
    hosts: list[str]
    """Names, with the port, under which the pages are served."""
    roots: list[str]
    """Other folders of runs whose files are served."""
    edit: bool
    """Whether notes, tags and names can be changed."""

    def to_line(self) -> bytes:
        """What `main` reads."""
        return json.dumps(asdict(self)).encode() + b"\n"


def environment() -> dict[str, str]:
    """The environment of the process: none of MLflow's settings but those that it needs.

    A user's own, such as a server's password or a weaker protection, are for other servers.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lstrip("_").upper().startswith("MLFLOW_")
    }
    return kept | {
        # No usage statistics are sent to MLflow's developers.
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }


def _end_with_parent(parent: BinaryIO, folder: Path) -> None:
    """Wait for the end of our input, which only a process that still lives keeps open."""
    while parent.read(1):
        pass
    for _ in range(_REMOVALS):  # a request on its way may be making a file in it
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def main() -> None:
    """Serve until the parent or a signal ends it."""
    parent = sys.stdin.buffer
    settings = Settings(**json.loads(parent.readline()))
    watch = threading.Thread(
        target=_end_with_parent, args=(parent, Path(settings.folder)), daemon=True
    )
    watch.start()

    database = Path(settings.database)
    prepare(database)
    uri = sqlite_uri(database)
    files = str(Path(settings.folder) / "no-artifacts")
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = uri
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = files
    os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(settings.hosts)
    import uvicorn
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(uri, uri, files)
    roots = [Path(root) for root in settings.roots]
    folders = ArtifactFolders(roots, Path(settings.runs_dir))
    gate = Gate(app, settings.token, settings.hosts, folders, edit=settings.edit)
    config = uvicorn.Config(
        gate,
        lifespan="off",
        ws="none",
        access_log=False,  # an address may hold the token
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GOODBYE_SECONDS,
    )
    uvicorn.Server(config).run([socket.socket(fileno=settings.listener)])


if __name__ == "__main__":
    main()
