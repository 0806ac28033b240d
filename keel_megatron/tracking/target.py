"""The MLflow run that a run's reports are for: where it is, and what it is called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from keel_megatron.config.reading import parse_json, read_small, read_small_text
from keel_megatron.config.run import RunConfig
from keel_megatron.tracking.spool import FOLDER, SpoolReader
from keel_megatron.tracking.sqlite_uri import sqlite_file, sqlite_uri

Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How an MLflow run ends: as planned; by an error, or without a word; because it was asked to."""

RUN_ID_FILE = "mlflow_run_id"
_OLDER_FILE = "target.json"
"""Where versions whose starts do not name their place kept the run's, in its spool."""
_ARTIFACTS = "mlflow_artifacts"
_PARAM_LENGTH = 6000


@dataclass(frozen=True)
class Target:
    """What the courier must know of the configuration; every start leaves its own in the spool."""

    uri: str | None
    """MLflow's tracking URI; None = the sqlite file in the run's folder."""
    experiment: str
    name: str
    params: dict[str, str]
    artifacts: str | None
    """Where the files of a new experiment go; None = as the server says."""

    @classmethod
    def of(cls, config: RunConfig) -> Target:
        """That of a configuration."""
        tracking = config.tracking
        return cls(
            tracking.uri,
            tracking.experiment,
            config.training.name,
            flat_params(config),
            _artifact_location(config),
        )

    @classmethod
    def of_start(cls, run: Path, start: Mapping[str, Any]) -> Target | None:
        """That of a start in a run's spool; None if there is no start, or its place is not known.

        Args:
            run: the run's folder; an earlier version's start has its place there.
            start: the item's values.
        """
        if not start:
            return None
        older = run / FOLDER / _OLDER_FILE
        if "target" not in start and not older.is_file():
            return None
        return cls(**(start.get("target") or parse_json(read_small(older))))

    @classmethod
    def newest(cls, run: Path) -> Target | None:
        """That of the newest start in a run's folder; None if it has never reported to MLflow."""
        reader = SpoolReader(run)
        reader.scan()
        return cls.of_start(run, reader.last_start)

    def to_json(self) -> dict[str, Any]:
        """What `of_start` reads."""
        return asdict(self)

    def uri_of(self, run: Path) -> str:
        """The URI, wherever the run's folder is."""
        return self.uri or local_uri(run)


def local_uri(run: Path) -> str:
    """The sqlite file in a run's folder."""
    return sqlite_uri((run / "mlflow.db").resolve())


def local_artifacts(run: Path) -> str:
    """URI of the folder of artifacts beside that file."""
    return (run.resolve() / _ARTIFACTS).as_uri()


def tracking_uri(config: RunConfig) -> str:
    """`tracking.uri`, or the sqlite file in the run's folder."""
    return config.tracking.uri or local_uri(config.training.folder)


def without_credentials(text: str) -> str:
    """A text in which no URI has a user or password."""
    return re.sub(r"(\w://)[^/\s]*@", r"\1***@", text)


def remembered_run_id(folder: Path) -> str | None:
    """The MLflow run of a run's folder, if it has one."""
    marker = folder / RUN_ID_FILE
    return (read_small_text(marker).strip() or None) if marker.is_file() else None


def remember_run_id(folder: Path, run_id: str) -> None:
    """Make this the MLflow run of a run's folder."""
    partial = folder / f"{RUN_ID_FILE}.partial"
    partial.write_text(run_id + "\n", encoding="utf-8")
    partial.replace(folder / RUN_ID_FILE)


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


def _artifact_location(config: RunConfig) -> str | None:
    """A database has no place of its own for files, and MLflow's default is ./mlruns."""
    uri = tracking_uri(config)
    database = sqlite_file(uri)
    if database is not None:
        parent = database.parent
    elif uri.partition("://")[0].partition("+")[0] in ("postgresql", "mysql", "mssql"):
        parent = config.training.runs_dir
    else:
        return None
    return (parent.resolve() / _ARTIFACTS).as_uri()
