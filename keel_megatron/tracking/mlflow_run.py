"""A run as MLflow sees it. Everything here may block or fail: only the sink's thread calls it."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keel_megatron import __version__
from keel_megatron.config.run import RunConfig

Status = Literal["FINISHED", "FAILED", "KILLED"]

RUN_ID_FILE = "mlflow_run_id"
METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
_PACKAGES = ("torch", "megatron-core", "numpy", "sentencepiece")


@dataclass(frozen=True)
class Metrics:
    """Values of a step, as they wait to be delivered."""

    step: int
    timestamp_ms: int
    """When they were reported, in milliseconds since 1970."""
    values: dict[str, float]


def tracking_uri(config: RunConfig) -> str:
    """`tracking.uri`, or the sqlite file in the run's folder."""
    return config.tracking.uri or f"sqlite:///{(config.training.folder / 'mlflow.db').resolve()}"


def without_credentials(text: str) -> str:
    """A text in which no URI has a user or password."""
    return re.sub(r"(\w://)[^/\s]*@", r"\1***@", text)


def remembered_run_id(folder: Path) -> str | None:
    """The MLflow run of a run's folder, if it has one."""
    marker = folder / RUN_ID_FILE
    return (marker.read_text(encoding="utf-8").strip() or None) if marker.is_file() else None


def remember_run_id(folder: Path, run_id: str) -> None:
    """Make this the MLflow run of a run's folder."""
    partial = folder / f"{RUN_ID_FILE}.partial"
    partial.write_text(run_id + "\n", encoding="utf-8")
    partial.replace(folder / RUN_ID_FILE)


class MlflowRun:
    """A client and the MLflow run that it writes to.

    The URI is always given to the client: MLflow's own default would be set by whatever mlruns
    folder lies in the working directory.

    Args:
        config: the run.
        run_id: MLflow run to go on with; None makes a new one and keeps its id in the run's folder.

    Attributes:
        run_id: the MLflow run.
        remark: what the user should know about how it was opened, if anything.
    """

    def __init__(self, config: RunConfig, run_id: str | None) -> None:
        from mlflow import MlflowClient

        # Importing MLflow makes its loggers tell of every table that they create.
        logging.getLogger("alembic").setLevel(logging.ERROR)
        logging.getLogger("mlflow").setLevel(logging.ERROR)

        self.remark: str | None = None
        self._config = config
        self._client: Any = MlflowClient(tracking_uri=tracking_uri(config))
        known = self._get(run_id) if run_id is not None else None
        if known is None:
            if run_id is not None:
                self.remark = f"MLflow has no run {run_id} any longer: a new one is made"
            else:
                self._end_predecessor()
            known = self._create()
        elif known.info.status != "RUNNING":
            self._client.update_run(known.info.run_id, status="RUNNING")
        self.run_id: str = known.info.run_id
        self._remember()
        self._log_params(known.data.params)

    def log_metrics(self, metrics: Sequence[Metrics]) -> None:
        """Write values, in as few calls as MLflow allows."""
        from mlflow.entities import Metric

        points = [
            Metric(key, float(value), item.timestamp_ms, item.step)
            for item in metrics
            for key, value in item.values.items()
        ]
        for start in range(0, len(points), METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=points[start : start + METRICS_PER_CALL])

    def log_artifact(self, path: str) -> None:
        """Copy a file."""
        self._client.log_artifact(self.run_id, path)

    def end(self, status: Status) -> None:
        """Set the final status."""
        self._client.set_terminated(self.run_id, status)

    def _get(self, run_id: str) -> Any:
        """The MLflow run; None if it was deleted or is another server's."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _end_predecessor(self) -> None:
        """The run starts anew: what a kill left behind in its folder does not run any longer."""
        before = remembered_run_id(self._config.training.folder)
        run = self._get(before) if before is not None else None
        if run is not None and run.info.status == "RUNNING":
            self._client.set_terminated(before, "KILLED")

    def _create(self) -> Any:
        name = self._config.tracking.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            experiment_id = experiment.experiment_id
        else:
            experiment_id = self._client.create_experiment(
                name, artifact_location=_artifact_location(self._config)
            )
        return self._client.create_run(
            experiment_id, run_name=self._config.training.name, tags=_versions()
        )

    def _remember(self) -> None:
        remember_run_id(self._config.training.folder, self.run_id)

    def _log_params(self, known: dict[str, str]) -> None:
        """The configuration. A param never changes, so what a resumed run changes is a tag."""
        from mlflow.entities import Param, RunTag

        wanted = flat_params(self._config)
        params = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(params), _PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=params[start : start + _PARAMS_PER_CALL])
        changed = [
            RunTag(f"changed.{key}", value)
            for key, value in wanted.items()
            if known.get(key, value) != value
        ]
        if changed:
            self._client.log_batch(self.run_id, tags=changed[:_PARAMS_PER_CALL])


def flat_params(config: RunConfig) -> dict[str, str]:
    """The configuration as `section.key`: text, within MLflow's limit of length."""
    params = {
        f"{section}.{key}": str(value)
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
    }
    params["tracking.uri"] = without_credentials(params["tracking.uri"])
    return {
        key: value if len(value) <= _PARAM_LENGTH else value[: _PARAM_LENGTH - 3] + "..."
        for key, value in params.items()
    }


def _versions() -> dict[str, str]:
    """Tags; a package that is not installed has none."""
    tags = {"version.keel-megatron": __version__, "version.python": platform.python_version()}
    for package in _PACKAGES:
        try:
            tags[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return tags


def _artifact_location(config: RunConfig) -> str | None:
    """Where a database keeps files; None leaves it to the server.

    A database has no place of its own for files, and MLflow's default is ./mlruns.
    """
    uri = tracking_uri(config)
    kind, _, rest = uri.partition("://")
    if kind.startswith("sqlite"):
        parent = Path(rest.removeprefix("/").partition("?")[0]).parent
    elif kind.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        parent = config.training.runs_dir
    else:
        return None
    return (parent / "mlflow_artifacts").resolve().as_uri()
