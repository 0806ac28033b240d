"""Which database `keel dashboard` serves, and what it does before and while it serves it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from keel_megatron.dashboard.folders import saved_settings
from keel_megatron.errors import UserError
from keel_megatron.mlflow_delivery.database import database_of, why_foreign
from keel_megatron.mlflow_delivery.presence import the_only_one
from keel_megatron.mlflow_delivery.reasons import reason
from keel_megatron.mlflow_delivery.run_file import original_of
from keel_megatron.mlflow_delivery.sqlite_uri import sqlite_file
from keel_megatron.mlflow_delivery.sync import sync
from keel_megatron.mlflow_delivery.takeover import has_earlier_database, take_over_now
from keel_megatron.mlflow_delivery.target import Target
from keel_megatron.tracking.outbox import FOLDER
from keel_megatron.urls import without_credentials


@dataclass(frozen=True)
class Shown:
    """A database, and the runs that were asked for and report to it."""

    database: Path
    runs: list[Path]
    others: list[str] = field(default_factory=list)
    """A line for every other run that was asked for."""

    @property
    def foreign(self) -> str | None:
        """Why the database is not this user's; None if it is, or will be made."""
        if self.database.exists() or self.database.is_symlink():
            return why_foreign(self.database)
        return None if _is_mine(self.database.parent) else "belongs to another user"


def choose(runs: Sequence[Path]) -> Shown:
    """The database of the first run that has one.

    Raises:
        UserError: none has; with the reason for each.
    """
    chosen: Path | None = None
    shown, others = [], []
    for run in runs:
        database, why = _database(run)
        if database is None:
            others.append(f"{run.name} {why}")
            continue
        chosen = chosen or database
        if database == chosen:
            shown.append(run)
        else:
            command = f"keel dashboard {shlex.quote(str(run))}"
            others.append(f"{run.name} reports to {database}: `{command}` shows it")
    if chosen is None:
        raise UserError("; ".join(["none of these runs reports to a local database", *others]))
    return Shown(chosen, shown, others)


def fill(runs: Sequence[Path], say: Callable[[str], None]) -> None:
    """Deliver what this user's runs have not delivered to their database.

    Those are runs on a network file system, whose workers leave the database alone, runs whose
    worker died, and runs of earlier versions, which had a database each. Addresses that a folder
    names are not contacted.
    """
    for run in runs:
        try:
            if _is_mine(run):
                take_over_now(run)
                if _waits(run):
                    sync(run)
        except UserError as error:
            say(str(error))
        except Exception as error:  # an error of one run does not hide the others
            say(f"{run}: {reason(error)}")


def _waits(run: Path) -> bool:
    """Whether a run reports to the local database, and no process delivers now."""
    try:
        target = Target.newest(run)
        if target is None or target.uri is not None or original_of(run) is not None:
            return False
        with the_only_one(run, wait=False) as free:
            return free
    except (OSError, ValueError):
        return False


def _is_mine(folder: Path) -> bool:
    try:
        return folder.stat().st_uid == os.geteuid() and os.access(folder, os.W_OK)
    except OSError:
        return False


def _database(run: Path) -> tuple[Path | None, str]:
    """The database of a run, or why there is none."""
    tracking = saved_settings(run).get("tracking", {})
    uri = tracking.get("uri")
    path = database_of(run) if uri is None else sqlite_file(str(uri))
    original = original_of(run)
    if original is not None:
        return None, f"is a copy of {original} that was not started yet"
    if path is None:
        return None, f"reports to {without_credentials(str(uri))}: look there"
    if not os.access(run, os.R_OK | os.X_OK):
        return None, "cannot be read"
    if tracking.get("mlflow") is False:
        return None, "does not report to MLflow: tracking.mlflow is false"
    if uri is None:
        fillable = (run / FOLDER).is_dir() or has_earlier_database(run)
        if not (path.is_file() or fillable):
            return None, f"has reported nothing yet: there is no {path}"
    elif not path.is_file():
        return None, f"cannot be shown: there is no {path}"
    return path.resolve(), ""
