"""A run's folder may come from anybody: what it names and links to must lie in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from keel_megatron.config.errors import UserError

_CHECKPOINTS = "checkpoints"


def check_links(folder: Path) -> None:
    """See that no link in a run's folder leads out of it, where this program would write or read.

    Args:
        folder: the run's folder; itself, or the way to it, may be a link. What is in a checkpoint
            has a check of its own.

    Raises:
        UserError: one does, also if nothing is there.
    """
    home = folder.resolve()
    for link in _links(folder):
        place = link.resolve()
        if not place.is_relative_to(home):
            raise UserError(
                f"{link} is a link to {place}, outside of the run's folder, where runs neither "
                "read nor write: put what it leads to in its place, or move the whole folder "
                "(training.runs_dir)"
            )


def inside(folder: Path, name: str) -> Path | None:
    """What a name in a run's folder stands for, if all of it lies in the folder.

    Args:
        folder: the run's folder.
        name: a path relative to it, or an absolute one, of a file or a folder.

    Returns:
        The path without links, of something that may be missing; None if it is outside, has a link
        in it that leads outside, or is neither a file nor a folder.
    """
    home, place = folder.resolve(), (folder / name).resolve()
    if place == home or not place.is_relative_to(home):
        return None
    if not place.exists():
        return place
    if place.is_dir():
        out = [link for link in _links(place) if not link.resolve().is_relative_to(home)]
        return None if out else place
    return place if place.is_file() else None


def _links(folder: Path) -> Iterator[Path]:
    """The links in a folder, at every depth, without following any."""
    for parent, folders, files in os.walk(folder):
        at = Path(parent)
        for name in [*folders, *files]:
            if (at / name).is_symlink():
                yield at / name
        if at.name == _CHECKPOINTS and at.parent == folder:
            folders.clear()
