"""run.json: identity of the run in a folder, independent of the folder's path.

The file contains the run's id, and the folder's path at the last accepted start. At the next start
a folder is

- the same run if its path is unchanged, or if no run at the recorded path has this id: it was
  moved;
- a copy if the run at the recorded path still has the id. A copy becomes a new run: it gets a new
  id, and the original's id is recorded as its origin. The copied database, artifacts, MLflow run id
  and undelivered reports are moved to `origin/ID/`; the original delivers them itself.

A copy whose original was moved, renamed or deleted before the copy's first start cannot be
distinguished from a moved run.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from keel_megatron.config.reading import parse_json, read_small
from keel_megatron.errors import UserError
from keel_megatron.mlflow_delivery.earlier_spool import FOLDER as SPOOL
from keel_megatron.mlflow_delivery.target import RUN_ID_FILE, remembered_run_id
from keel_megatron.runtime.files import write_whole
from keel_megatron.tracking.outbox import FOLDER as OUTBOX

FILE = "run.json"
ORIGIN_FOLDER = "origin"
_ID = re.compile(r"[0-9a-f]{32}")
_OF_THE_ORIGINAL = ("mlflow.db*", "mlflow_artifacts", OUTBOX, SPOOL, RUN_ID_FILE)


@dataclass(frozen=True)
class Origin:
    """The original of a copied run."""

    id: str
    """The original's id."""
    place: str
    """The original's folder when the copy was first started."""
    step: int
    """Step of the checkpoint that the copy resumed from; 0 = none."""
    mlflow_run_id: str | None = None
    """Id of the original's MLflow run."""

    def tags(self) -> dict[str, str]:
        """Tags of the copy's MLflow run."""
        return {f"origin.{key}": str(value) for key, value in asdict(self).items() if value}


@dataclass(frozen=True)
class RunFile:
    """A run's identity."""

    id: str
    """Random, 32 hexadecimal digits."""
    place: str
    """The folder, absolute and without links, at the last accepted start."""
    origin: Origin | None = None
    """What this run was copied from, if it was."""

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> RunFile | None:
        """An identity from a file or a checkpoint; None if it is not valid."""
        if not isinstance(values, Mapping):
            return None
        with suppress(KeyError, TypeError):
            if not _ID.fullmatch(str(values["id"])):  # a folder is named after it
                return None
            origin = values.get("origin")
            known = None if origin is None else Origin(**origin)
            return cls(str(values["id"]), str(values["place"]), known)
        return None


def read_run_file(folder: Path) -> RunFile | None:
    """The identity in a folder; None if it has none, as from earlier versions."""
    try:
        return RunFile.from_json(parse_json(read_small(folder / FILE)))
    except (OSError, ValueError):
        return None


def original_of(folder: Path, known: RunFile | None = None) -> Path | None:
    """The folder of which this one is an unstarted copy; None if it is not one.

    Args:
        folder: a run's folder.
        known: its identity; None reads it from the folder.
    """
    known = known or read_run_file(folder)
    if known is None or known.place == str(folder.resolve()):
        return None
    place = Path(known.place)
    there = read_run_file(place)
    if there is None or there.id != known.id:
        return None
    with suppress(OSError):
        if place.samefile(folder):  # another way to the same folder
            return None
    return place


def take_run_file(
    folder: Path, step: int = 0, saved: Mapping[str, Any] | None = None
) -> tuple[RunFile, list[str]]:
    """Set a folder's identity to that of the run that is about to train in it.

    Call it once per start, after the start is accepted and before anything reports to MLflow.

    Args:
        folder: the run's folder.
        step: step of the checkpoint that the run resumes from; 0 = none.
        saved: the identity in that checkpoint, for a folder without one.

    Returns:
        The identity, and messages for the user.

    Raises:
        UserError: the folder cannot be written.
    """
    known = read_run_file(folder) or RunFile.from_json(saved)
    here = str(folder.resolve())
    try:
        if known is None:
            return _write(folder, RunFile(uuid.uuid4().hex, here)), []
        original = original_of(folder, known)
        if original is not None:
            origin = Origin(known.id, str(original), step, remembered_run_id(original))
            _set_aside(folder, known.id)
            copy = _write(folder, RunFile(uuid.uuid4().hex, here, origin))
            return copy, [
                f"this folder is a copy of {original}, which keeps its MLflow run: it is a new "
                f"run from step {step} on"
            ]
        moved = [] if known.place == here else [f"the run was moved here from {known.place}"]
        return _write(folder, replace(known, place=here)), moved
    except OSError as error:
        raise UserError(
            f"training.runs_dir: cannot write the run's folder {folder}: {error.strerror}"
        ) from error


def _set_aside(folder: Path, original_id: str) -> None:
    """Move the copied parts of the original's MLflow run to `origin/`."""
    aside = folder / ORIGIN_FOLDER / original_id
    for pattern in _OF_THE_ORIGINAL:
        for path in sorted(folder.glob(pattern)):
            aside.mkdir(parents=True, exist_ok=True)
            path.rename(aside / path.name)


def _write(folder: Path, identity: RunFile) -> RunFile:
    write_whole(folder / FILE, json.dumps(identity.to_json(), indent=1) + "\n")
    return identity
