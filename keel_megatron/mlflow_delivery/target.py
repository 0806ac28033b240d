"""The MLflow run of a run's reports: its address and its name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keel_megatron.config.reading import parse_json, read_small, read_small_text
from keel_megatron.config.run import RunConfig
from keel_megatron.mlflow_delivery.database import ARTIFACTS, artifacts_uri, local_uri
from keel_megatron.mlflow_delivery.earlier_spool import FOLDER as SPOOL
from keel_megatron.mlflow_delivery.earlier_spool import SpoolReader
from keel_megatron.mlflow_delivery.outbox_reader import OutboxReader
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_file
from keel_megatron.runtime.files import write_whole
from keel_megatron.urls import without_credentials

RUN_ID_FILE = "mlflow_run_id"
_OLDER_FILE = "target.json"
"""File with the address in `spool/`, from versions whose starts do not name it."""
_DATABASES = ("postgresql", "mysql", "mssql")
_RUN_ID = re.compile(r"[A-Za-z0-9][\w-]{0,255}", re.ASCII)
"""MLflow's own rule. The id becomes a folder's name."""
_PARAM_LENGTH = 6000


@dataclass(frozen=True)
class Target:
    """The part of the configuration that the MLflow worker needs; every start logs its own."""

    uri: str | None
    """MLflow's tracking URI; None = the database of the folder of runs (database.py)."""
    experiment: str
    name: str
    params: dict[str, str]

    @classmethod
    def of(cls, config: RunConfig) -> Target:
        """The target of a configuration."""
        tracking = config.tracking
        return cls(
            tracking.uri,
            tracking.experiment,
            config.training.name,
            flat_params(config),
        )

    @classmethod
    def of_start(cls, run: Path, start: Mapping[str, Any]) -> Target | None:
        """The target of a start in a run's event log; None if there is no start, or no address.

        The folder is untrusted: check `is_trusted` before using the address.

        Args:
            run: the run's folder; an earlier version's start has its address there.
            start: the event's values.
        """
        if not start:
            return None
        if "target" in start:
            return cls._from_json(start["target"])
        older = run / SPOOL / _OLDER_FILE
        if not older.is_file():
            return None
        return cls._from_json(parse_json(read_small(older)))

    @classmethod
    def newest(cls, run: Path) -> Target | None:
        """The target of the newest start in a run's folder; None if it never reported."""
        start: dict[str, Any] = {}
        for reader in (SpoolReader(run), OutboxReader(run)):
            reader.scan()
            start = reader.last_start or start
        return cls.of_start(run, start)

    def to_json(self) -> dict[str, Any]:
        """What `of_start` reads."""
        return asdict(self)

    def uri_of(self, run: Path) -> str:
        """The URI; for the local database, of the run's present folder."""
        return self.uri or local_uri(run)

    def is_trusted(self, confirmed: Collection[str]) -> bool:
        """Whether it is the local database, or an address that the user has confirmed."""
        return not self.uri or self.uri.rstrip("/") in {uri.rstrip("/") for uri in confirmed}

    def artifacts(self, run: Path) -> str | None:
        """Location of a new experiment's files; None: chosen by the server.

        A database stores no files, and MLflow's default is ./mlruns.
        """
        database = sqlite_file(self.uri_of(run))
        if database is not None:
            return artifacts_uri(database)
        if self.uri_of(run).partition("://")[0].partition("+")[0] in _DATABASES:
            return (run.resolve().parent / ARTIFACTS).as_uri()
        return None

    @classmethod
    def _from_json(cls, values: Any) -> Target | None:
        if not isinstance(values, Mapping) or not isinstance(values.get("params"), Mapping):
            return None
        uri, experiment, name = (values.get(key) for key in ("uri", "experiment", "name"))
        if not (isinstance(experiment, str) and isinstance(name, str)):
            return None
        params = {str(key): str(value) for key, value in values["params"].items()}
        return cls(str(uri) if uri else None, experiment, name, params)


def tracking_uri(config: RunConfig) -> str:
    """`tracking.uri`, or the database of the folder of runs."""
    return config.tracking.uri or local_uri(config.training.folder)


def sync_command(run: Path, uri: str | None) -> str:
    """The command that delivers undelivered reports; its address is the user's confirmation."""
    to = f" --to {shlex.quote(without_credentials(uri))}" if uri else ""
    return f"keel track sync {shlex.quote(str(run))}{to}"


def remembered_run_id(folder: Path) -> str | None:
    """The MLflow run of a run's folder, if it has one."""
    marker = folder / RUN_ID_FILE
    with suppress(UnicodeDecodeError):
        run_id = read_small_text(marker).strip() if marker.is_file() else ""
        return run_id if _RUN_ID.fullmatch(run_id) else None
    return None


def remember_run_id(folder: Path, run_id: str) -> None:
    """Record the MLflow run of a run's folder."""
    write_whole(folder / RUN_ID_FILE, run_id + "\n")


def flat_params(config: RunConfig) -> dict[str, str]:
    """The configuration as `section.key` to text, within MLflow's length limit."""
    params = {
        f"{section}.{key}": without_credentials(str(value))
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
    }
    return {
        key: value if len(value) <= _PARAM_LENGTH else value[: _PARAM_LENGTH - 3] + "..."
        for key, value in params.items()
    }
