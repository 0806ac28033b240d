"""Ports for what must be told its port before it binds it.

A port that a probe was given and has closed again may be given to anybody before it is used. These
lie below the range from which the kernel gives ports (32768 and up), and each is locked for the
process that asked for it, so that no other test takes it meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCKS = Path(tempfile.gettempdir()) / f"keel-test-ports-{os.getuid()}"


@contextmanager
def reserved_port(first: int = 20_000, last: int = 29_999) -> Iterator[int]:
    """A port that nobody uses, for this process within the block."""
    LOCKS.mkdir(exist_ok=True)
    start = first + os.getpid() % (last - first)
    for port in [*range(start, last + 1), *range(first, start)]:
        with (LOCKS / str(port)).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with socket.create_server(("127.0.0.1", port)):
                    pass
            except OSError:
                continue
            yield port
            return
    raise AssertionError(f"no free port from {first} to {last}")
