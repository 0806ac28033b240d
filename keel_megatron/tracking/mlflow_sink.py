"""MLflow, off the training path: records go to a queue that a thread delivers in batches."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from keel_megatron.config.run import RunConfig
from keel_megatron.tracking.mlflow_run import (
    METRICS_PER_CALL,
    Metrics,
    MlflowRun,
    Status,
    tracking_uri,
    without_credentials,
)
from keel_megatron.tracking.records import Record

_SECONDS_PER_BATCH = 0.5
_PATIENCE = 3.0
"""Seconds of waiting without a word."""


@dataclass(frozen=True)
class Artifact:
    """A file, as it waits to be delivered."""

    path: str


@dataclass(frozen=True)
class Finish:
    """The end of the run, after which nothing comes."""

    status: Status


Item = Metrics | Artifact | Finish
"""What the queue holds: plain values that could as well be written to a file."""


class MlflowSink:
    """Delivers a run's parameters, metrics and files to MLflow.

    Nothing here stops or slows training: even MLflow's import (1 to 2 s) happens in the thread.
    What goes wrong is said once and counted.

    Args:
        config: the run.
        warn: told once when MLflow fails and, at the end, what was not delivered; called from the
            thread or from `finish`.
        run_id: MLflow run to go on with; None makes a new one.
        close_seconds: longest wait of `finish`.

    Attributes:
        opened: set once MLflow has the run and `run_id` is known.
    """

    def __init__(
        self,
        config: RunConfig,
        warn: Callable[[str], None],
        run_id: str | None = None,
        close_seconds: float = 30.0,
    ) -> None:
        # A training job tells MLflow's makers nothing unless its user says so, and the run's
        # address is said by us, without the password that it may hold.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        self._config = config
        self._warn = warn
        self._resume_id = run_id
        self._close_seconds = close_seconds
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._run: MlflowRun | None = None
        self.opened = threading.Event()
        self._ended = False
        self._silent = False
        self._handed = [0, 0]
        self._delivered = [0, 0]
        self._failures = 0
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, once it is open."""
        return self._run.run_id if self._run is not None else None

    @property
    def failures(self) -> int:
        """Deliveries that failed so far."""
        return self._failures

    def record(self, record: Record) -> None:
        """Hand over a record's values."""
        values = record.to_json()
        del values["step"]
        self.values(record.step, values)

    def values(self, step: int, values: dict[str, float]) -> None:
        """Hand over a step's values under their names."""
        self._handed[0] += 1
        self._queue.put(Metrics(step, time.time_ns() // 1_000_000, values))

    def artifact(self, path: Path) -> None:
        """Hand over a file, copied when its turn comes."""
        self._handed[1] += 1
        self._queue.put(Artifact(str(path)))

    def finish(self, status: Status) -> None:
        """End the MLflow run, waiting a bounded time for what is on its way; nothing may follow."""
        self._queue.put(Finish(status))
        # A server that never answered is not worth the whole wait.
        hopeless = self._run is None and self._failures > 0
        longest = min(_PATIENCE, self._close_seconds) if hopeless else self._close_seconds
        try:
            self._thread.join(min(_PATIENCE, longest))
            if self._thread.is_alive() and longest > _PATIENCE:
                self._warn(f"waiting up to {longest:.0f} s for MLflow ({self._shown_uri})")
                self._thread.join(longest - _PATIENCE)
        finally:
            self._silent = True
        missing = [
            f"{handed - delivered} of {handed} {name}"
            for name, handed, delivered in zip(
                ("records", "files"), self._handed, self._delivered, strict=True
            )
            if handed > delivered
        ]
        if not self._ended:
            missing.append(f"the status {status}")
        if missing:
            self._warn(
                f"MLflow ({self._shown_uri}) did not get {', '.join(missing)}; "
                "metrics.jsonl has every record"
            )

    @property
    def _shown_uri(self) -> str:
        return without_credentials(tracking_uri(self._config))

    def _work(self) -> None:
        self._try(self._open)  # at once, so that the run is there before its first step
        finished = False
        while not finished:
            batch = self._collect()
            metrics = [item for item in batch if isinstance(item, Metrics)]
            if metrics:
                self._try(self._send_metrics, metrics)
            for item in batch:
                if isinstance(item, Artifact):
                    self._try(self._send_artifact, item)
                elif isinstance(item, Finish):
                    self._try(self._end, item)
                    finished = True

    def _collect(self) -> list[Item]:
        """Wait for an item, then take what comes until a batch is full or its time is over."""
        batch = [self._queue.get()]
        points = 0
        deadline = time.monotonic() + _SECONDS_PER_BATCH
        while points < METRICS_PER_CALL and not isinstance(batch[-1], Finish):
            if isinstance(batch[-1], Metrics):
                points += len(batch[-1].values)
            try:
                batch.append(self._queue.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
        return batch

    def _open(self) -> MlflowRun:
        if self._run is None:
            self._run = MlflowRun(self._config, self._resume_id)
            self.opened.set()
            if self._run.remark is not None:
                self._say(self._run.remark)
        return self._run

    def _send_metrics(self, metrics: list[Metrics]) -> None:
        self._open().log_metrics(metrics)
        self._delivered[0] += len(metrics)

    def _send_artifact(self, item: Artifact) -> None:
        self._open().log_artifact(item.path)
        self._delivered[1] += 1

    def _end(self, item: Finish) -> None:
        self._open().end(item.status)
        self._ended = True

    def _try(self, action: Callable[..., object], *arguments: object) -> None:
        try:
            action(*arguments)
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                self._say(self._explained(error))

    def _explained(self, error: Exception) -> str:
        if isinstance(error, ImportError):
            return (
                f"MLflow cannot be imported ({error}): install mlflow-skinny, sqlalchemy and "
                "alembic, or set tracking.mlflow=false; training goes on, metrics.jsonl has it all"
            )
        reason = without_credentials((str(error).splitlines() or [""])[0])[:200]
        return (
            f"MLflow ({self._shown_uri}) failed: {type(error).__name__}: {reason}; "
            "training goes on, metrics.jsonl has it all (tracking.uri, tracking.mlflow)"
        )

    def _say(self, text: str) -> None:
        if not self._silent:
            self._warn(text)
