"""A process that hears signals while its main thread waits in C, and how to end it by them."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keel_megatron.training.stop import SAME_SECONDS

# It waits for a lock, as it does for the others in a collective: no handler of Python's runs.
BLOCKED = """
import ctypes
from keel_megatron.training.stop import stop_requests
library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
with stop_requests():
    print("ready", flush=True)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)
"""


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that hears SIGINT, also if the tests run in a script's background; killed after."""

    def hear() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, preexec_fn=hear, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[bytes], number: signal.Signals, seconds: float = 300.0) -> int:
    """Send a signal until the process ends, as often as a slow machine needs; its exit code.

    Seldom after the second one: a launcher that is leaving no longer takes them.
    """
    limit, patience = time.monotonic() + seconds, 1.1 * SAME_SECONDS
    while time.monotonic() < limit:
        process.send_signal(number)
        try:
            return process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            patience = 15.0
    raise AssertionError(f"{number.name} did not end it in {seconds} s")
