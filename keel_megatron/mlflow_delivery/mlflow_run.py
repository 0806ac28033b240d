"""An MLflow run. Every call may block or fail: only the MLflow worker makes them."""

from __future__ import annotations

import datetime
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.mlflow_delivery.changes import Change
from keel_megatron.mlflow_delivery.client import experiment_id, open_client
from keel_megatron.mlflow_delivery.database import (
    database_of,
    link_artifacts,
    local_artifacts,
    prepare,
)
from keel_megatron.mlflow_delivery.study import PARENT_TAG, parent_run_id
from keel_megatron.mlflow_delivery.takeover import move_artifacts, take_over
from keel_megatron.mlflow_delivery.target import (
    Target,
    remember_run_id,
    remembered_run_id,
)
from keel_megatron.tracking.metric_names import DESCRIPTION
from keel_megatron.tracking.records import Status

METRICS_PER_CALL = 1000
_PER_CALL = 100
_TAG_LENGTH = 4000
_START_TAG = "keel.start"


@dataclass(frozen=True)
class Point:
    """A value of a metric."""

    name: str
    value: float
    step: int
    timestamp_ms: int
    """When it was reported, in milliseconds since 1970."""


class MlflowRun:
    """A client and the MLflow run that it writes to, after `start` or `reopen`.

    Args:
        folder: the run's folder.
        target: the MLflow run and its server.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder = folder
        self._target = target
        self._is_local = target.uri is None
        if self._is_local:
            prepare(database_of(folder))
        self._client = open_client(target.uri_of(folder))
        if self._is_local:
            take_over(folder, self._client)
        self._run: Any = None

    @property
    def run_id(self) -> str | None:
        """The MLflow run."""
        return None if self._run is None else str(self._run.info.run_id)

    def start(
        self, start: str, back_to: int | None, time_ms: int, *, again: bool = False
    ) -> str | None:
        """Begin a new MLflow run, or continue the folder's.

        Args:
            start: name of this start; a second call with the same name changes nothing.
            back_to: step that the run resumes from; None = a new MLflow run.
            time_ms: when.
            again: the whole run is delivered again, to its existing MLflow run.

        Returns:
            A message for the user, or None.
        """
        known, remark = self._remembered(), None
        if known is not None and (again or known.data.tags.get(_START_TAG) == start):
            self._run = known
        elif back_to is None:
            if known is not None and known.info.status == "RUNNING":
                self._client.set_terminated(known.info.run_id, "FAILED")
            self._create(start, time_ms)
        elif known is None:
            gone = remembered_run_id(self._folder)
            if gone is not None:
                remark = _replaced(gone)
            self._create(start, time_ms)
        else:
            self._run = known
            self.rewind(back_to, time_ms)
            self._rename()
            self.tag({_START_TAG: start})
        assert self._run is not None
        parent = parent_run_id(self._folder)
        if parent is not None:
            self.tag({PARENT_TAG: parent})
        if self._is_local:
            link_artifacts(self._folder, str(self.run_id))
        if self._run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        self._log_params(self._run)
        return remark

    def reopen(self) -> None:
        """Find the folder's MLflow run, or create it."""
        if self._run is None:
            self._run = self._remembered()
        if self._run is None:
            self._create("", None)

    def replace_if_gone(self) -> str | None:
        """Create a new run if this one was deleted; a message if it was."""
        if self._run is None or self._get(self._run.info.run_id) is not None:
            return None
        gone, start = self.run_id, self._run.data.tags.get(_START_TAG, "")
        self._create(start, None)
        self._log_params(self._run)
        return _replaced(gone)

    def log(self, points: Sequence[Point]) -> None:
        """Write values, in as few calls as MLflow allows.

        An infinite one is written as NaN: MLflow would make it 1.8e308.
        """
        from mlflow.entities import Metric

        def stored(value: float) -> float:
            return math.nan if math.isinf(value) else float(value)

        metrics = [Metric(p.name, stored(p.value), p.timestamp_ms, p.step) for p in points]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def seconds_since_start(self, time_ms: int) -> int:
        """The step of a machine's values: whole seconds since the MLflow run's first start."""
        return max(0, (time_ms - int(self._run.info.start_time)) // 1000)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        wanted = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(wanted), _PER_CALL):
            self._client.log_batch(self.run_id, tags=wanted[start : start + _PER_CALL])

    def rewind(self, step: int, time_ms: int) -> None:
        """Record a return to a step: the tag `resumed.N` marks the points after it as replaced.

        MLflow cannot delete points. Of two points of a step, the later one is valid; after an exact
        resume both have the same values, except times and speeds.
        """
        when = datetime.datetime.fromtimestamp(time_ms / 1000, datetime.UTC)
        tags = self._client.get_run(self.run_id).data.tags
        # To the millisecond: it also tells one rewind, delivered twice, from two of them.
        text = f"from step {step}, {when.replace(tzinfo=None).isoformat(timespec='milliseconds')}Z"
        before = [value for name, value in tags.items() if name.startswith("resumed.")]
        if any(value.startswith(text) for value in before):
            return
        counts = "; of two points of a step the later counts"
        self.tag({f"resumed.{len(before) + 1}": text + counts})

    def set_changes(self, changes: Sequence[Change]) -> None:
        """Record changed settings, one tag `changed.step_NNNNNNNN` per step.

        Other tags of changes are removed: those of steps before which the run returned, and the
        `changed.SETTING` tags of earlier versions.
        """
        by_step: dict[str, list[str]] = {}
        for change in changes:
            by_step.setdefault(f"changed.step_{change.step:08d}", []).append(str(change))
        wanted = {name: _cut("; ".join(texts)) for name, texts in by_step.items()}
        self._set_tags("changed.", wanted)

    def log_file(self, path: Path) -> None:
        """Copy a file, or a folder under its name and its parent's."""
        if self._is_local:
            self._keep_file(path)
        elif path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), f"{path.parent.name}/{path.name}")
        else:
            self._client.log_artifact(self.run_id, str(path))

    def answers(self) -> bool:
        """Whether MLflow answers and has the run."""
        try:
            self._client.get_run(self.run_id)
        except Exception:
            return False
        return True

    def end(self, status: Status, time_ms: int | None = None) -> None:
        """Set the final status."""
        self._client.set_terminated(self.run_id, status, end_time=time_ms)

    def _keep_file(self, path: Path) -> None:
        """Copy it to the run's own artifact folder, to which MLflow has a link.

        Not through MLflow, which would write to the location in the database.
        """
        place = local_artifacts(self._folder) / str(self.run_id) / "artifacts"
        if path.is_dir():
            shutil.copytree(path, place / path.parent.name / path.name, dirs_exist_ok=True)
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place / path.name)

    def _remembered(self) -> Any:
        run_id = remembered_run_id(self._folder)
        return None if run_id is None else self._get(run_id)

    def _get(self, run_id: str, deleted: bool = False) -> Any:
        """The MLflow run; None if it is on another server, or deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if deleted or run.info.lifecycle_stage == "active" else None

    def _create(self, start: str, time_ms: int | None) -> None:
        target, before = self._target, remembered_run_id(self._folder)
        tags = {_START_TAG: start, "mlflow.note.content": DESCRIPTION}
        place = target.artifacts(self._folder)
        experiment = experiment_id(self._client, target.experiment, place, local=self._is_local)
        self._run = self._client.create_run(
            experiment, start_time=time_ms, run_name=target.name, tags=tags
        )
        remember_run_id(self._folder, str(self.run_id))
        if self._is_local and before is not None and self._get(before, deleted=True) is None:
            move_artifacts(self._folder, before, str(self.run_id))

    def _log_params(self, run: Any) -> None:
        """Log the current configuration.

        MLflow keeps a parameter's first value. A tag `config.KEY` has the current value of
        each parameter whose first value differs.
        """
        from mlflow.entities import Param

        wanted, known = self._target.params, run.data.params
        params = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(params), _PER_CALL):
            self._client.log_batch(self.run_id, params=params[start : start + _PER_CALL])
        other = {key: value for key, value in wanted.items() if known.get(key, value) != value}
        self._set_tags("config.", {f"config.{key}": _cut(value) for key, value in other.items()})

    def _rename(self) -> None:
        """Apply a changed training.name; keep a name that was edited in MLflow's pages."""
        data, name = self._run.data, self._target.name
        before = data.tags.get("config.training.name", data.params.get("training.name", name))
        if before != name:
            self._client.update_run(self.run_id, name=name)

    def _set_tags(self, prefix: str, wanted: Mapping[str, str]) -> None:
        """Replace all tags with this prefix by these."""
        known = self._client.get_run(self.run_id).data.tags
        self.tag({key: value for key, value in wanted.items() if known.get(key) != value})
        for key in known:
            if key.startswith(prefix) and key not in wanted:
                self._client.delete_tag(self.run_id, key)


def _cut(text: str) -> str:
    return text if len(text) <= _TAG_LENGTH else text[: _TAG_LENGTH - 3] + "..."


def _replaced(run_id: str | None) -> str:
    return f"MLflow has no run {run_id} any longer: a new one is made"
