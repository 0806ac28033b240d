"""MLflow, off the training path: reports go to the run's spool, which another process delivers."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from keel_megatron.config.run import RunConfig
from keel_megatron.mlflow_delivery import worker
from keel_megatron.mlflow_delivery.changes import Change
from keel_megatron.mlflow_delivery.outbox import EVENTS, FOLDER, SpoolWriter, Waiting, relative
from keel_megatron.mlflow_delivery.target import Status, Target, sync_command, tracking_uri
from keel_megatron.runtime.interpreter import environment, python
from keel_megatron.tracking.records import Record, ValidationRecord
from keel_megatron.urls import without_credentials

CLOSE_SECONDS = 30.0
"""Longest wait for MLflow at the end of a run."""
_PATIENCE = 3.0
"""Seconds of waiting without a word."""
_RESPAWN_SECONDS = 30.0


class MlflowSink:
    """Hands a run's parameters, values and files over for MLflow.

    A call here appends a line to a file (spool.py) and returns. Even MLflow's import happens in the
    courier's process (worker.py), which this one starts, and starts again should it die.

    Args:
        config: the run; its folder exists.
        warn: told what the user should know, from a thread or from `finish`.
        back_to: step that the run goes on from, in the folder's MLflow run; None begins a new one.
        close_seconds: longest wait of `finish`; None = CLOSE_SECONDS.
    """

    def __init__(
        self,
        config: RunConfig,
        warn: Callable[[str], None],
        back_to: int | None = None,
        close_seconds: float | None = None,
    ) -> None:
        self._run = config.training.folder
        self._warn = warn
        self._uri = without_credentials(tracking_uri(config))
        self._to = config.tracking.uri
        self._close_seconds = CLOSE_SECONDS if close_seconds is None else close_seconds
        self._name = uuid.uuid4().hex
        self._closing = threading.Event()
        self._said_full = False
        self._spool = SpoolWriter(self._run, EVENTS)
        self._put(
            "start",
            target=Target.of(config).to_json(),
            name=self._name,
            host=socket.gethostname(),
            pid=os.getpid(),
            born=psutil.Process().create_time(),
            **({} if back_to is None else {"back_to": back_to}),
        )
        self._process = self._start_courier()
        self._listener = threading.Thread(target=self._listen, name="mlflow", daemon=True)
        self._listener.start()

    def record(self, record: Record) -> None:
        """Hand over a record's values."""
        values = record.to_json()
        if isinstance(record, ValidationRecord):  # the step's own record has the rest
            values = {"validation_loss": record.validation_loss}
        values.pop("step", None)
        self.values(record.step, values)

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over a step's values by their fields' names (metric_names.py) or MLflow's."""
        self._put("metrics", step=step, values=values)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Hand over tags."""
        self._put("tags", tags=tags)

    def changes(self, changes: Sequence[Change]) -> None:
        """Hand over all changes of settings on the way to where the run stands."""
        self._put("changes", changes=[change.to_json() for change in changes])

    def artifact(self, path: Path) -> None:
        """Hand over a file, copied when its turn comes."""
        self._put("artifact", path=relative(self._run, path))

    def rewind(self, step: int) -> None:
        """The run goes back to a step: the values after it are void."""
        self._put("rewind", back_to=step)

    def last_word(self, status: Status) -> None:
        """Leave how the run ends, for a process that is about to end itself."""
        self._put("end", status=status)

    def finish(self, status: Status) -> None:
        """End the MLflow run, waiting a bounded time for what is on its way; nothing may follow."""
        self._closing.set()
        self._put("end", status=status)
        if self._process.poll() not in (None, worker.UNUSABLE):
            self._process = self._start_courier()  # the last one died before its time
        try:
            if not self._ends_within(min(_PATIENCE, self._close_seconds)):
                self._warn(f"waiting up to {self._close_seconds:.0f} s for MLflow ({self._uri})")
                self._ends_within(self._close_seconds - _PATIENCE)
        finally:
            self._process.kill()  # does nothing to one that has ended
            self._process.wait()
            self._spool.close()
        self._listener.join(1.0)
        self._tell_what_waits()

    def _put(self, kind: str, **values: object) -> None:
        self._spool.append(kind, time=time.time_ns() // 1_000_000, **values)
        if self._spool.left_out and not self._said_full:
            self._said_full = True
            self._warn(
                f"{self._run / FOLDER} is full of what MLflow ({self._uri}) did not get: further "
                "points are left out of MLflow until it answers; metrics.jsonl has every record"
            )

    def _ends_within(self, seconds: float) -> bool:
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _tell_what_waits(self) -> None:
        waiting = Waiting.of(self._run)
        if waiting:
            self._warn(
                f"MLflow ({self._uri}) did not get everything: {waiting} wait in "
                f"{self._run / FOLDER}; `{sync_command(self._run, self._to)}` delivers them"
            )
        if self._spool.unwritten:
            self._warn(
                f"MLflow ({self._uri}) did not get {self._spool.unwritten} report(s) for which "
                f"{self._run / FOLDER} had no room; metrics.jsonl may have them"
            )
        if self._spool.left_out:
            self._warn(
                f"MLflow ({self._uri}) will not get {self._spool.left_out:,} point(s) for which "
                f"{self._run / FOLDER} had no room; metrics.jsonl has every record"
            )

    def _start_courier(self) -> subprocess.Popen[str]:
        command = [*python(), "-m", worker.__name__, str(self._run)]
        to = ["--to", self._to] if self._to else []
        return subprocess.Popen(
            [*command, "--parent", str(os.getpid()), "--start", self._name, *to],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is not for it
        )

    def _listen(self) -> None:
        """Pass on what the courier says; start another one should it die."""
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
                self._process = self._start_courier()
