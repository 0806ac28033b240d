"""A process that hears signals while its main thread waits in C, and how to end it by them."""

from __future__ import annotations

import signal
import subprocess
import time

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


def end(process: subprocess.Popen[bytes], number: signal.Signals, seconds: float = 300.0) -> int:
    """Send a signal until the process ends, as often as a slow machine needs; its exit code."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        process.send_signal(number)
        try:
            return process.wait(timeout=1.1 * SAME_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"{number.name} did not end it in {seconds} s")
