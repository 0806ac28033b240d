"""The MLflow worker, as the training process starts, supervises and awaits it."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from keel_megatron.mlflow_delivery import worker
from keel_megatron.mlflow_delivery.outbox_reader import Waiting
from keel_megatron.mlflow_delivery.target import sync_command
from keel_megatron.runtime.interpreter import environment, python
from keel_megatron.urls import without_credentials

CLOSE_SECONDS = 30.0
"""Longest wait for the MLflow worker at the end of a run."""
_PATIENCE = 3.0
"""Seconds of waiting without a message."""
_RESPAWN_SECONDS = 30.0


class WorkerProcess:
    """The process that delivers a run's log (worker.py). Even MLflow's import happens there.

    It is started immediately, and restarted if it dies.

    Args:
        run: the run's folder, in which the start is logged.
        start: the name of the start.
        uri: address to which the run reports.
        to: tracking.uri, confirmed because the user has set it; None: the local database.
        warn: called with messages, from a thread or from `finish`.
        close_seconds: longest wait of `finish`; None = CLOSE_SECONDS.
    """

    def __init__(
        self,
        run: Path,
        start: str,
        uri: str,
        to: str | None,
        warn: Callable[[str], None],
        close_seconds: float | None = None,
    ) -> None:
        self._run = run
        self._start_name = start
        self._uri = without_credentials(uri)
        self._to = to
        self._warn = warn
        self._close_seconds = CLOSE_SECONDS if close_seconds is None else close_seconds
        self._closing = threading.Event()
        self._process = self._start()
        self._listener = threading.Thread(target=self._listen, name="mlflow", daemon=True)
        self._listener.start()

    def finish(self) -> None:
        """Wait a limited time for the delivery; the run has logged its end."""
        self._closing.set()
        if self._process.poll() not in (None, worker.UNUSABLE):
            self._process = self._start()  # the last one died before its time
        is_done = True
        try:
            if not self._ends_within(min(_PATIENCE, self._close_seconds)):
                self._warn(
                    f"waiting up to {self._close_seconds:.0f} s for MLflow ({self._uri}) and the "
                    "pictures"
                )
                is_done = self._ends_within(self._close_seconds - _PATIENCE)
        finally:
            self._process.kill()  # does nothing to one that has ended
            self._process.wait()
        self._listener.join(1.0)
        self._tell_what_waits(is_done)

    @property
    def is_unusable(self) -> bool:
        """Whether the process has ended because MLflow cannot be used at all."""
        return self._process.poll() == worker.UNUSABLE

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _tell_what_waits(self, is_done: bool) -> None:
        waiting = Waiting.of(self._run)
        if waiting:
            self._warn(
                f"MLflow ({self._uri}) did not receive everything: {waiting} wait in {self._run}; "
                f"`{sync_command(self._run, self._to)}` delivers them"
            )
        elif not is_done:
            command = f"keel depth {shlex.quote(str(self._run))}"
            self._warn(f"the depth profiles are not drawn yet: `{command}` draws them")

    def _start(self) -> subprocess.Popen[str]:
        command = [*python(), "-m", worker.__name__, str(self._run)]
        to = ["--to", self._to] if self._to else []
        return subprocess.Popen(
            [*command, "--parent", str(os.getpid()), "--start", self._start_name, *to],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is not for it
        )

    def _listen(self) -> None:
        """Forward the worker's messages; restart it if it dies."""
        while True:
            process = self._process
            assert process.stdout is not None
            for line in process.stdout:
                self._warn(line.rstrip("\n"))
            if process.wait() == worker.UNUSABLE:
                return
            if self._closing.wait(_RESPAWN_SECONDS):
                if self._process is process:
                    return
            elif not self._closing.is_set():
                self._process = self._start()
