"""Requests to stop: which code each one means, and that the second one is not waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from keel_megatron.training.stop import SIGNAL_FILE, StopRequest, launched_at, stop_requests

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 75}

# The main thread waits for a lock in C, as it does for the others in a collective: no handler runs.
BLOCKED = """
import ctypes
from keel_megatron.training.stop import stop_requests
library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
with stop_requests():
    print("ready", flush=True)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize("number", CODES)
def test_a_signal_is_only_remembered(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop
        assert stop.exit_code == 0
        os.kill(os.getpid(), number)
        end = time.monotonic() + 5
        while not stop and time.monotonic() < end:
            time.sleep(0.01)
        assert stop.exit_code == CODES[number]
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_a_process_that_waits_in_c() -> None:
    with subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.7)
        process.send_signal(signal.SIGTERM)  # another signal is no second one
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.7)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


def test_what_a_scheduler_and_a_launcher_both_send_is_one_request() -> None:
    with subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(3):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.2)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=10) == 128 + signal.SIGUSR1


def test_a_process_below_a_deaf_torchrun_hears_the_request_to_save() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            end = time.monotonic() + 5
            while not stop and time.monotonic() < end:
                time.sleep(0.01)
            assert stop.exit_code == 75
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_process_under_nohup_goes_on_ignoring_a_lost_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_limit_counts_from_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StopRequest(time.time() + 60).exit_code == 0
    assert StopRequest(time.time() - 1).exit_code == 75
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launched_at() == psutil.Process().create_time()
    # A group that torchrun starts again has what is left of torchrun's own time.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert launched_at() == psutil.Process().parent().create_time()
    with stop_requests(exit_after=60.0) as stop:
        assert stop.deadline == launched_at() + 3600


def test_a_signal_that_came_while_it_was_starting_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noted = tmp_path / "signal"
    monkeypatch.setenv(SIGNAL_FILE, str(noted))
    for text in (None, "", "nonsense"):
        if text is not None:
            noted.write_text(text)
        with stop_requests() as stop:
            assert not stop
    noted.write_text("SIGUSR1\n")  # as launchers/torchrun.sh writes it
    with stop_requests() as stop:
        assert stop.exit_code == CODES[signal.SIGUSR1]
        os.kill(os.getpid(), signal.SIGUSR1)  # and hands it on: the same request
        time.sleep(0.2)
        assert stop.exit_code == CODES[signal.SIGUSR1]
