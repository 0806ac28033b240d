"""Descriptions of a run's checkpoints: no torch, nothing is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.identity import changeable
from keel_megatron.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    STATE,
    DamagedError,
    check,
    read_json,
    read_manifest,
)
from keel_megatron.config.nearby import nearby
from keel_megatron.errors import UserError
from keel_megatron.runtime.tables import table_lines

T = TypeVar("T")
_LAYOUT = (
    ("TP", "tensor"),
    ("PP", "pipeline"),
    ("VPP", "virtual_pipeline"),
    ("DP", "data"),
)


@dataclass(frozen=True)
class Entry:
    """One folder among a run's checkpoints."""

    path: Path
    step: int | None
    """None if it is no checkpoint: half-written, or set aside."""
    bytes: int
    problem: str | None
    """What is wrong with it; None if nothing is, as far as was looked."""
    modified: float
    """When it was written, seconds since 1970."""

    def to_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return asdict(self) | {"path": str(self.path)}

    def cells(self) -> tuple[str, str, str, str]:
        """Name, size, local time and condition."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.modified))
        condition = f"DAMAGED: {self.problem}" if self.problem else "good"
        if self.step is None:
            condition = str(self.problem)
        return self.path.name, f"{self.bytes / 1e6:,.2f}", when, condition


def table(found: Sequence[Entry]) -> list[str]:
    """Lines of a table of checkpoints."""
    if not found:
        return ["no checkpoints yet"]
    columns = ("checkpoint", "MB", "written", "condition")
    return table_lines(columns, [entry.cells() for entry in found], left=(0, 2, 3))


def entries(run_folder: Path, *, read_all: bool) -> list[Entry]:
    """A run's checkpoints by step, then what is no checkpoint.

    A folder that the run removes meanwhile is left out.

    Args:
        run_folder: the run's folder.
        read_all: read every file and compare checksums; else look at names and sizes alone.

    Raises:
        UserError: the folder holds no checkpoints.
    """
    if not folder.root(run_folder).is_dir():
        raise UserError(
            f"{run_folder} contains no checkpoints: there is no {folder.root(run_folder)}; a run's "
            f"folder is runs/NAME{nearby(run_folder)}"
        )
    look: Callable[[Path], Any] = check if read_all else read_manifest
    found = []
    for step in folder.steps(run_folder):
        path = folder.step_folder(run_folder, step)
        found.append(_entry(path, step, _problem(path, look)))
    for path in folder.remains(run_folder):
        kind = "half-written" if path.suffix == ".partial" else "set aside"
        found.append(_entry(path, None, kind))
    return [entry for entry in found if entry is not None]


def _problem(path: Path, look: Callable[[Path], Any]) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        look(path)
    except (DamagedError, FileNotFoundError) as error:  # the latter: removed meanwhile
        return str(error)
    return None


def _entry(path: Path, step: int | None, problem: str | None) -> Entry | None:
    """The entry of a folder that has been looked at; None if it is no longer there."""
    size = _size(path)
    try:
        modified = path.stat().st_mtime
    except FileNotFoundError:
        return None
    return Entry(path, step, size, problem, modified)


def describe(run_folder: Path, step: int | None) -> list[str]:
    """What a checkpoint holds, a line each.

    Args:
        run_folder: the run's folder.
        step: the checkpoint's step; None = the newest whose names and sizes are right.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    return _read(run_folder, step, lambda *found: list(_description(*found)))


def as_object(run_folder: Path, step: int | None) -> dict[str, Any]:
    """The same as a JSON object.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    return _read(run_folder, step, _object)


def _read(run_folder: Path, step: int | None, of: Callable[[Path, int, dict[str, Any]], T]) -> T:
    """What `of` makes of a checkpoint's folder, number of files and state."""
    good = [
        entry.step
        for entry in entries(run_folder, read_all=False)
        if entry.step is not None and entry.problem is None
    ]
    if step is None and not good:
        raise UserError(f"{run_folder} has no valid checkpoint")
    path = folder.step_folder(run_folder, good[-1] if step is None else step)
    if not path.is_dir():
        there = ", ".join(map(str, folder.steps(run_folder))) or "none"
        raise UserError(f"--step: there is no {path}; there are: {there}")
    try:
        files, state = read_manifest(path), read_json(path / STATE)
        return of(path, len(files), state)
    except (DamagedError, FileNotFoundError) as error:
        state = "is damaged" if path.is_dir() else "has been removed"
        raise UserError(f"{path} {state}: {error}") from None
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged: {STATE} is not the state of a run") from None


def prune_run(run_folder: Path, keep: int, keep_every: int, *, damaged: bool) -> list[Path]:
    """Remove old checkpoints, judged by reading all of them; the removed ones.

    After an anomaly that the newest good one records, the newest from before it stays.
    Not for a run that is being trained now: what it writes at this moment looks half-written.

    Args:
        run_folder: the run's folder.
        keep: newest good ones that stay.
        keep_every: good ones of multiples of so many steps stay too; 0 = none.
        damaged: remove damaged, half-written and set-aside ones too; else they stay.

    Raises:
        UserError: the folder holds no checkpoints, or a folder cannot be removed.
    """
    bad = [entry for entry in entries(run_folder, read_all=True) if entry.problem is not None]
    spare = {entry.step for entry in bad if entry.step is not None}
    try:
        removed = folder.prune(run_folder, keep, keep_every, spare, _anomaly(run_folder, spare))
        for entry in reversed(bad) if damaged else []:
            folder.remove(entry.path)
            removed.append(entry.path)
    except OSError as error:
        where = error.filename or folder.root(run_folder)
        raise UserError(f"cannot remove {where}: {error.strerror or error}") from None
    return removed


def _anomaly(run_folder: Path, spare: set[int]) -> int | None:
    """Step at which training went wrong lately, as the guard had it in the newest good one."""
    good = [step for step in folder.steps(run_folder) if step not in spare]
    if not good:
        return None
    try:
        state = read_json(folder.step_folder(run_folder, good[-1]) / STATE)
        anomaly = state["extras"].get("guard", {}).get("anomaly")  # absent in older checkpoints
    except (DamagedError, TypeError, KeyError, AttributeError):
        return None
    return anomaly if type(anomaly) is int else None


def _object(path: Path, files: int, state: dict[str, Any]) -> dict[str, Any]:
    kept = ("step", "consumed_samples", "layout", "device", "packages")
    origin = state["extras"].get("initialized_from")
    return {
        "path": str(path),
        **{name: state[name] for name in kept},
        "files": files + 1,
        "bytes": _size(path),
        "data_fingerprint": state["data"].get("fingerprint"),
        "initialized_from": None if origin is None else origin["path"],
    }


def _description(path: Path, files: int, state: dict[str, Any]) -> list[str]:
    layout = " x ".join(f"{name} {state['layout'][key]}" for name, key in _LAYOUT)
    packages = ", ".join(f"{name} {version}" for name, version in state["packages"].items())
    parts = ", ".join(name for name, value in state["extras"].items() if value is not None)
    return [
        f"checkpoint  {path}",
        f"step        {state['step']}",
        f"samples     {state['consumed_samples']}",
        f"layout      {layout} on {state['device']} (any layout can resume from it)",
        f"files       {files} and {MANIFEST}, {_size(path) / 1e6:,.2f} MB",
        f"data        {state['data'].get('fingerprint', 'unknown')}",
        *_start(state["extras"].get("initialized_from")),
        f"also keeps  {parts or 'nothing'}",
        f"packages    {packages}",
        f"settings    {path / CONFIG} (keel train takes it as CONFIG)",
        f"may change  {changeable()}",
    ]


def _start(origin: dict[str, Any] | None) -> list[str]:
    """What the run started from, if it was another's weights."""
    if origin is None:
        return []
    how = "as a continuation of" if origin.get("position") else "from the weights of"
    return [f"started     {how} {origin['path']}"]


def _size(path: Path) -> int:
    """Bytes of a folder's files; those that are removed meanwhile count as nothing."""
    if path.is_symlink():
        return 0
    total = 0
    for parent, _folders, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
