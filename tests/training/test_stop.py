"""Requests to stop: which code each one means, and that the second one is not waited for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from keel_megatron.training import stop
from keel_megatron.training.stop import (
    SAME_SECONDS,
    SIGNAL_FILE,
    StopRequest,
    _listen,
    launched_at,
    stop_requests,
)
from tests.blocked import BLOCKED, end, started
from tests.hosts import await_that

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 75}


@pytest.mark.parametrize("number", CODES)
def test_a_signal_is_only_remembered(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as request:
        assert not request
        assert request.exit_code == 0
        os.kill(os.getpid(), number)
        await_that(lambda: bool(request), 300, "the request")
        assert request.exit_code == CODES[number]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], 143),
        ([signal.SIGINT, signal.SIGTERM, signal.SIGINT], 130),
    ],
)
def test_a_signal_that_comes_again_ends_a_process_that_waits_in_c(
    sent: list[signal.Signals], code: int
) -> None:
    """More than a second later, whatever came before or between; the others change nothing."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started([sys.executable, "-c", BLOCKED], **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        for number in sent[:-1]:
            process.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1.1 * SAME_SECONDS)
        assert end(process, sent[-1]) == code
        heard = process.stderr.read().decode()
    assert heard.startswith(f"{sent[0].name}: stopping after this step, with a checkpoint; ")
    assert heard.count("stopping") == 1


def heard_by_a_listener(
    sent: list[tuple[float, signal.Signals]], monkeypatch: pytest.MonkeyPatch
) -> tuple[signal.Signals | None, int | None]:
    """The request, and what the process ended with, for signals at times in seconds."""

    class EndedError(Exception):
        pass

    def leave(code: int) -> None:
        raise EndedError(code)

    def receive(_size: int) -> bytes:
        if not sent:
            return b""
        monkeypatch.setattr(stop.time, "monotonic", lambda now=sent[0][0]: now)
        return bytes([sent.pop(0)[1]])

    monkeypatch.setattr(stop.os, "_exit", leave)
    request = StopRequest()
    try:
        stop._listen(SimpleNamespace(recv=receive), request)  # type: ignore[arg-type]
    except EndedError as ended:
        return request.signal, ended.args[0]
    return request.signal, None


INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ([(0.0, USR1), (0.05, USR1), (0.9, USR1)], None),  # a scheduler and a launcher
        ([(0.0, TERM), (0.1, TERM), (5.0, INT), (5.1, INT)], None),
        ([(0.0, TERM), (9.0, INT)], None),
        ([(0.0, TERM), (9.0, INT), (10.5, INT)], 130),
        ([(0.0, TERM), (9.0, INT), (9.1, TERM)], 143),
        ([(0.0, INT), (0.4, INT), (0.8, INT), (1.2, INT)], 130),  # an impatient hand
    ],
)
def test_what_is_one_request_and_what_ends_the_process(
    sent: list[tuple[float, signal.Signals]], code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heard_by_a_listener(list(sent), monkeypatch) == (sent[0][1], code)


def test_a_process_below_a_deaf_torchrun_hears_the_request_to_save() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGUSR1)
            await_that(lambda: bool(request), 300, "the request")
            assert request.exit_code == 75
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_process_under_nohup_goes_on_ignoring_a_lost_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not request
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
    with stop_requests(exit_after=60.0) as request:
        assert request.deadline == launched_at() + 3600


def test_a_signal_that_came_while_it_was_starting_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stop, "SAME_SECONDS", 3600.0)  # a second one would end this process
    noted = tmp_path / "signal"
    monkeypatch.setenv(SIGNAL_FILE, str(noted))
    for text in (None, "", "nonsense"):
        if text is not None:
            noted.write_text(text)
        with stop_requests() as request:
            assert not request
    noted.write_text("SIGUSR1\n")  # as launchers/torchrun.sh writes it
    with stop_requests() as request:
        assert request.exit_code == CODES[signal.SIGUSR1]
        os.kill(os.getpid(), signal.SIGUSR1)  # and hands it on: the same request
        time.sleep(0.2)
        assert request.exit_code == CODES[signal.SIGUSR1]


STARTING = """
import ctypes, sys, time
from keel_megatron.training import stop
stop.LEAVE_SECONDS = 0.3
with stop.stop_requests(starting=True) as request:
    request.last_word = lambda: print("last word", flush=True)
    if sys.argv[1] == "accepted":
        request.starting = False
    print("ready", flush=True)
    try:
        if sys.argv[1] == "in C":
            library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(128)
            library.pthread_mutex_lock(lock)
            library.pthread_mutex_lock(lock)
        time.sleep(2.0 if sys.argv[1] == "accepted" else 60.0)
    finally:
        print("unwound", flush=True)
"""


@pytest.mark.parametrize(
    ("where", "number", "code", "shown"),
    [
        ("in Python", signal.SIGINT, 130, ["unwound"]),
        ("in Python", signal.SIGUSR1, 75, ["unwound"]),
        ("in C", signal.SIGTERM, 143, ["last word"]),
        ("accepted", signal.SIGTERM, 0, ["unwound"]),
    ],
)
def test_a_signal_ends_a_run_that_is_being_prepared(
    where: str, number: signal.Signals, code: int, shown: list[str]
) -> None:
    """Unless its main thread waits in C, everything that it has begun is undone."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTING, where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        status = psutil.Process(process.pid).status
        await_that(lambda: status() == psutil.STATUS_SLEEPING, 60, "its wait")
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, output.split("\n")[:-1]) == (code, shown)
    word = f"{number.name}: no step was made yet, ending\n"
    assert (word in errors) == (where != "accepted")


def test_a_signal_that_the_launcher_noted_breaks_a_start_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noted = tmp_path / "signal"
    noted.write_text("SIGUSR1\n")
    monkeypatch.setenv(SIGNAL_FILE, str(noted))
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    with pytest.raises(SystemExit) as end, stop_requests(starting=True):
        raise AssertionError("it was let in")
    assert end.value.code == CODES[signal.SIGUSR1]


def test_a_start_that_a_signal_ended_is_not_acknowledged_as_a_stop(
    capfd: pytest.CaptureFixture[str],
) -> None:
    receiver, sender = socket.socketpair()
    request = StopRequest(starting=True)
    with pytest.raises(SystemExit):
        request.break_off(signal.SIGTERM)
    request.starting = False  # the context has ended before the thread reads the signal
    sender.send(bytes([signal.SIGTERM]))
    sender.close()
    _listen(receiver, request)
    assert capfd.readouterr().err == "SIGTERM: no step was made yet, ending\n"
