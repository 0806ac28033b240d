"""The folder of a run's checkpoints: names, order, retention. No torch here."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"^step_(\d{8,})$")


def root(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def step_folder(run_folder: Path, step: int) -> Path:
    """The checkpoint of a step: checkpoints/step_NNNNNNNN."""
    return root(run_folder) / f"step_{step:08d}"


def steps(run_folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending. A half-written one has another name."""
    if not root(run_folder).is_dir():
        return []
    names = (_NAME.match(entry.name) for entry in root(run_folder).iterdir() if entry.is_dir())
    return sorted(int(name[1]) for name in names if name)


def latest(run_folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = steps(run_folder)
    return step_folder(run_folder, found[-1]) if found else None


def begin(run_folder: Path, step: int) -> Path:
    """An empty folder beside the checkpoint's own, to write into."""
    partial = step_folder(run_folder, step).with_suffix(".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path) -> Path:
    """Sync a written folder and give it its final name; an older one of that name is replaced."""
    final = partial.with_suffix("")
    for path in sorted(partial.rglob("*")):
        _sync(path)
    _sync(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)
    return final


def prune(run_folder: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` checkpoints; the removed ones."""
    removed = [step_folder(run_folder, step) for step in steps(run_folder)[:-keep]]
    for path in removed:
        shutil.rmtree(path)
    return removed


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
