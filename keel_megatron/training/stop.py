"""Requests to stop: signals and a time limit that end a run after its current step."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from keel_megatron.runtime import exit_codes

SIGNAL_FILE = "KEEL_SIGNAL_FILE"
"""Variable with a file in which launchers/torchrun.sh records a signal that it forwards: a trainer
that is still importing would die of it or miss it, and torchrun would restart it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LEAVE_SECONDS = 5.0
"""Time for a start that a signal aborts to end by itself, in seconds."""
SAME_SECONDS = 1.0
"""A signal that repeats within this many seconds is the same request: a scheduler signals every
process of a job, and a launcher forwards the signal too."""


class StopRequest:
    """The first signal that requested a stop, and the time limit.

    Args:
        deadline: when to stop, in seconds since 1970; None = never.
        starting: the run is being prepared; a signal ends the process.
    """

    def __init__(self, deadline: float | None = None, *, starting: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self.deadline = deadline
        self.starting = starting
        """While True, a signal raises SystemExit in the main thread."""
        self.broken_off = False
        """Whether a signal has ended the start: there is no step after which to stop."""
        self._unsaid = threading.Lock()
        self.last_word: Callable[[], None] | None = None
        """Called before a signal ends the process at once."""

    def __bool__(self) -> bool:
        return self.exit_code != exit_codes.DONE

    @property
    def exit_code(self) -> int:
        """Exit code of the process (runtime/exit_codes.py); 0 without a request to stop."""
        if self.signal is not None:
            return _code(self.signal)
        late = self.deadline is not None and time.time() >= self.deadline
        return exit_codes.SAVED if late else exit_codes.DONE

    def break_off(self, number: int) -> None:
        """End the process with a signal's code, unless the start is over.

        Raises:
            SystemExit: that is the end.
        """
        if self.starting:
            self.broken_off = True  # before `stop_requests` ends, whose thread may be later
            self.say_ending(number)
            raise SystemExit(exit_codes.for_torchrun(_code(number)))

    def say_ending(self, number: int) -> None:
        """Say once that a signal breaks the start off."""
        if self._unsaid.acquire(blocking=False) and os.environ.get("LOCAL_RANK", "0") == "0":
            name = signal.Signals(number).name
            with suppress(OSError):  # standard error may be closed
                os.write(2, f"{name}: no step was made yet, ending\n".encode())


def _code(number: int) -> int:
    return exit_codes.SAVED if number == signal.SIGUSR1 else exit_codes.to_shell(-number)


@contextmanager
def stop_requests(
    exit_after: float | None = None, *, starting: bool = False
) -> Iterator[StopRequest]:
    """Context in which signals only set the request; a repeated signal ends the process.

    The first signal is the request, and is acknowledged on standard error (once per node). A signal
    that repeats more than SAME_SECONDS after its own first arrival ends the process immediately.
    SIGTERM followed by Ctrl-C is still one request; another Ctrl-C ends the process.

    While the run is being prepared, there is nothing to save: the first signal ends the process.

    This also works while the main thread waits inside a collective, where Python runs no signal
    handler: a separate thread reads the signal numbers that the interpreter's C handler writes to a
    socket.

    Args:
        exit_after: minutes from the start of the launch to the request; None = never.
        starting: the run is being prepared, until `StopRequest.starting` is set to False.

    Raises:
        SystemExit: a signal came while it was being prepared.
    """
    request = StopRequest(deadline(exit_after), starting=starting)
    request.signal = _handed_on()
    if request.signal is not None:
        request.break_off(request.signal)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # Started with nohup, a process ignores SIGHUP, in a script's background SIGINT; it stays so.
    # SIGUSR1 is always handled: launchers/torchrun.sh makes torchrun, our parent, ignore it.
    chosen = [
        n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN or n == signal.SIGUSR1
    ]

    def hear(number: int, _frame: object) -> None:
        request.break_off(number)

    previous = {number: signal.signal(number, hear) for number in chosen}
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(receiver, request), daemon=True)
    listener.start()
    try:
        yield request
    finally:
        request.starting = False
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        sender.close()
        listener.join()
        receiver.close()


def _handed_on() -> signal.Signals | None:
    """The signal that the launcher recorded before this process could receive it."""
    try:
        with open(os.environ.get(SIGNAL_FILE, ""), encoding="utf-8") as file:
            return signal.Signals[file.read().strip()]
    except (OSError, KeyError):
        return None


def _listen(receiver: socket.socket, request: StopRequest) -> None:
    """Set the request at the first signal; end the process when a signal repeats."""
    first: dict[int, float] = {}
    if request.signal is not None:  # a launcher has recorded it already
        first[request.signal] = time.monotonic()
    while numbers := receiver.recv(16):
        for number in numbers:
            if number not in SIGNALS:
                continue
            if request.signal is None:
                request.signal = signal.Signals(number)
                if request.starting:
                    _leave_soon(request)
                elif not request.broken_off:
                    _acknowledge(request.signal)
            if number not in first:
                first[number] = time.monotonic()
            elif time.monotonic() - first[number] > SAME_SECONDS:
                if request.last_word is not None:
                    request.last_word()
                os._exit(exit_codes.for_torchrun(exit_codes.to_shell(-number)))


def _acknowledge(number: signal.Signals) -> None:
    """Acknowledge the signal: a step and a save may take minutes."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        text = (
            f"{number.name}: stopping after this step, with a checkpoint; {number.name} again "
            "ends the run at once\n"
        )
        with suppress(OSError):  # standard error may be closed
            os.write(2, text.encode())


def _leave_soon(request: StopRequest) -> None:
    """End a process that is starting, should its main thread not do so."""
    assert request.signal is not None
    number = request.signal
    request.say_ending(number)

    def leave() -> None:
        if request.starting:
            if request.last_word is not None:
                request.last_word()
            os._exit(exit_codes.for_torchrun(_code(number)))

    timer = threading.Timer(LEAVE_SECONDS, leave)
    timer.daemon = True
    timer.start()


def deadline(exit_after: float | None) -> float | None:
    """When a launch that may take `exit_after` minutes is to stop, in seconds since 1970."""
    return None if exit_after is None else launched_at() + 60.0 * exit_after


def launched_at() -> float:
    """When this run was started, in seconds since 1970.

    Under torchrun that is torchrun's own start, so a restarted process group does not get more
    time.
    """
    process = psutil.Process()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        process = process.parent() or process
    return process.create_time()
