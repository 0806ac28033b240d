"""The folder of a run's checkpoints: names, order, retention. No torch here."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

_NAME = re.compile(r"^step_([0-9]{8,15})$")
_PARTIAL = re.compile(r"^step_[0-9]{8,15}\.partial$")
_ASIDE = re.compile(r"^step_[0-9]{8,15}\.(damaged|replaced)(-[0-9]+)?$")


def root(run_folder: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_folder / "checkpoints"


def step_folder(run_folder: Path, step: int) -> Path:
    """The checkpoint of a step: checkpoints/step_NNNNNNNN."""
    return root(run_folder) / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def steps(run_folder: Path) -> list[int]:
    """Steps of the published checkpoints, ascending. A half-written one has another name."""
    if not root(run_folder).is_dir():
        return []
    names = (_NAME.match(entry.name) for entry in root(run_folder).iterdir() if entry.is_dir())
    return sorted(int(name[1]) for name in names if name)


def latest(run_folder: Path) -> Path | None:
    """The newest published checkpoint, or None; `resume.newest_good` checks it."""
    found = steps(run_folder)
    return step_folder(run_folder, found[-1]) if found else None


def remains(run_folder: Path) -> list[Path]:
    """Folders of unfinished saves, and of checkpoints whose step was saved again."""
    if not root(run_folder).is_dir():
        return []
    return sorted(
        entry
        for entry in root(run_folder).iterdir()
        if entry.is_dir() and (_PARTIAL.match(entry.name) or _ASIDE.match(entry.name))
    )


def partial_folder(run_folder: Path, step: int) -> Path:
    """Where a checkpoint is written until it is complete."""
    return step_folder(run_folder, step).with_suffix(".partial")


def begin(run_folder: Path, step: int) -> Path:
    """An empty folder beside the checkpoint's own, to write into."""
    partial = partial_folder(run_folder, step)
    _discard(partial)
    partial.mkdir(parents=True)
    sync(root(run_folder))
    return partial


def publish(partial: Path, *, damaged: bool = False) -> Path:
    """Give a folder whose files are written and synced its final name.

    Args:
        partial: the folder.
        damaged: a folder that has the name already is a damaged checkpoint, which is set aside as
            NAME.damaged; else it is an older one of the same step, and replaced.
    """
    final = partial.with_suffix("")
    sync(partial)
    old = None
    if os.path.lexists(final):
        old = _free_name(final, "damaged" if damaged else "replaced")
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    if old is not None and not damaged:
        _discard(old)
    return final


def prune(
    run_folder: Path,
    keep: int,
    keep_every: int = 0,
    spare: Collection[int] = (),
    anomaly_step: int | None = None,
    is_whole: Callable[[Path], bool] = lambda _path: True,
) -> list[Path]:
    """Remove all but the newest `keep` checkpoints and those kept for good; the removed ones.

    Args:
        run_folder: the run's folder.
        keep: how many of the newest stay.
        keep_every: checkpoints of multiples of so many steps stay too; 0 = none.
        spare: steps of damaged ones: neither counted nor removed.
        anomaly_step: the first step of an anomaly that is not over (`training.guard.Guard`): the
            newest checkpoint from before it stays too.
        is_whole: whether a folder is the checkpoint that its name says; what is not is neither
            counted nor removed.

    Raises:
        OSError: one cannot be removed, or the folder of checkpoints is a link: what lies there may
            be another run's.
    """
    if root(run_folder).is_symlink():
        why = "is a link, and old checkpoints are only removed from the run's own folder"
        raise OSError(errno.ELOOP, why, str(root(run_folder)))
    good = [step for step in steps(run_folder) if step not in spare]
    whole = 0
    before, removable = None, []
    for step in reversed(good):
        kept_for_good = bool(keep_every) and step % keep_every == 0
        may_be_before = before is None and anomaly_step is not None and step < anomaly_step
        if whole >= keep and kept_for_good and not may_be_before:
            continue  # not looked into: there may be many
        if not is_whole(step_folder(run_folder, step)):
            continue
        whole += 1
        if may_be_before:
            before = step
        elif whole > keep and not kept_for_good:
            removable.append(step)
    removed = []
    for step in reversed(removable):
        path = step_folder(run_folder, step)
        remove(path)
        removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Remove a checkpoint; a kill on the way leaves a half-written one, never a damaged one."""
    if not path.suffix and not path.is_symlink():
        partial = path.with_suffix(".partial")
        _discard(partial)
        path = path.rename(partial)
    _discard(path)


def _discard(path: Path) -> None:
    """Remove a folder with all that is in it; a link or file as such. What is not there is fine.

    Raises:
        OSError: it cannot be removed; with the file's name and why.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(final: Path, kind: str) -> Path:
    aside, number = final.with_name(f"{final.name}.{kind}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = final.with_name(f"{final.name}.{kind}-{number}")
    return aside
