"""MLflow, off the training path: records go to a queue that a thread delivers in batches."""

from __future__ import annotations

import importlib.metadata
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from keel_megatron.config.run import RunConfig
from keel_megatron.tracking.records import Record

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_ID_FILE = "mlflow_run_id"
_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
_SECONDS_PER_CALL = 0.5
_CLOSE_SECONDS = 30.0
_PACKAGES = ("keel-megatron", "torch", "megatron-core", "numpy", "sentencepiece")


def tracking_uri(config: RunConfig) -> str:
    """`tracking.uri`, or the sqlite file in the run's folder."""
    return config.tracking.uri or f"sqlite:///{(config.training.folder / 'mlflow.db').resolve()}"


class MlflowSink:
    """Delivers a run's parameters, metrics and files to MLflow.

    Nothing here stops or slows training: even MLflow's import happens in the thread. What goes
    wrong is said once and counted.

    Args:
        config: the run.
        warn: told when MLflow fails.
    """

    def __init__(self, config: RunConfig, warn: Callable[[str], None]) -> None:
        self._config = config
        self._warn = warn
        self._queue: queue.SimpleQueue[Record | Path | Status] = queue.SimpleQueue()
        self._failures = 0
        self._delivered = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def record(self, record: Record) -> None:
        """Hand over a record's values."""
        self._queue.put(record)

    def artifact(self, path: Path) -> None:
        """Hand over a file, copied when its turn comes."""
        self._queue.put(path)

    def finish(self, status: Status) -> None:
        """End the MLflow run with a status, waiting a bounded time for what is on its way."""
        self._queue.put(status)
        self._thread.join(_CLOSE_SECONDS)
        if not self._delivered.is_set():
            self._warn(
                f"MLflow ({tracking_uri(self._config)}) did not take everything: the run's "
                "metrics.jsonl has it"
            )

    def _deliver(self) -> None:
        session: _Session | None = None
        status: Status | None = None
        while status is None:
            metrics, files, status = self._collect()
            try:
                session = session or _Session(self._config)
                session.send(metrics, files)
                if status is not None:
                    session.client.set_terminated(session.run_id, status)
                    self._delivered.set()
            except Exception as error:
                self._fail(error)

    def _collect(self) -> tuple[list[Record], list[Path], Status | None]:
        """What came in until a batch is full or its time is over."""
        metrics: list[Record] = []
        files: list[Path] = []
        deadline = time.monotonic() + _SECONDS_PER_CALL
        while len(metrics) < _METRICS_PER_CALL:
            try:
                item = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if isinstance(item, str):
                return metrics, files, item
            if isinstance(item, Path):
                files.append(item)
            else:
                metrics.append(item)
        return metrics, files, None

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            self._warn(
                f"MLflow ({tracking_uri(self._config)}) does not answer: "
                f"{str(error).splitlines()[0][:200]}; training goes on, metrics.jsonl has it all"
            )


class _Session:
    """A client and the MLflow run that it writes to."""

    def __init__(self, config: RunConfig) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        # Importing MLflow sets its loggers to tell of every table that it makes.
        for name in ("alembic", "mlflow", "mlflow.store"):
            logging.getLogger(name).setLevel(logging.ERROR)

        self._metric = Metric
        # Always given: a stray mlruns folder would change MLflow's own default.
        self.client: Any = MlflowClient(tracking_uri=tracking_uri(config))
        marker = config.training.folder / RUN_ID_FILE
        if marker.is_file():
            self.run_id = marker.read_text().strip()
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self._create(config)
            marker.write_text(self.run_id + "\n")
        params = [Param(key, value[:_PARAM_LENGTH]) for key, value in _flat(config).items()]
        known = self.client.get_run(self.run_id).data.params
        params = [param for param in params if param.key not in known]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, params=params[start : start + _PARAMS_PER_CALL])

    def _create(self, config: RunConfig) -> str:
        name = config.tracking.experiment
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            location = None
            if config.tracking.uri is None:
                location = (config.training.folder / "mlflow_artifacts").resolve().as_uri()
            experiment_id = self.client.create_experiment(name, artifact_location=location)
        tags = {f"version.{package}": importlib.metadata.version(package) for package in _PACKAGES}
        run = self.client.create_run(experiment_id, run_name=config.training.name, tags=tags)
        return str(run.info.run_id)

    def send(self, records: list[Record], files: list[Path]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(key, float(value), now, int(record.step))
            for record in records
            for key, value in record.values().items()
            if key != "step"
        ]
        for start in range(0, len(metrics), _METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _METRICS_PER_CALL])
        for path in files:
            self.client.log_artifact(self.run_id, str(path))


def _flat(config: RunConfig) -> dict[str, str]:
    sections = config.model_dump(mode="json")
    return {
        f"{section}.{key}": str(value)
        for section, values in sections.items()
        for key, value in values.items()
    }
