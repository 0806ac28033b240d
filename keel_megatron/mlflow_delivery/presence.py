"""The processes of a run's outbox: the one worker that delivers it, and the training process."""

from __future__ import annotations

import fcntl
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from keel_megatron.tracking.outbox import FOLDER

HEARTBEAT_SECONDS = 10.0


@contextmanager
def the_only_one(run: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the outbox's lock within the block; False if another worker holds it.

    The system releases the lock when its process ends. On a file system without locks, every
    process gets it.
    """
    path = run / FOLDER / "lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True


def is_alive(session: dict[str, Any], run: Path) -> bool:
    """Whether the training process of a session may still run.

    On another machine: whether its MLflow worker updated its heartbeat within the last minute.
    """
    if session.get("host") == socket.gethostname():
        pid, born = session.get("pid"), session.get("born")
        if not (type(pid) is int and pid > 0 and isinstance(born, (int, float))):
            return False  # invalid: every start records both
        return process_runs(pid, born)
    try:
        return time.time() - (run / FOLDER / "alive").stat().st_mtime < 6 * HEARTBEAT_SECONDS
    except OSError:
        return False


def process_runs(pid: int, born: float) -> bool:
    """Whether a process with this id and time of creation runs."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
