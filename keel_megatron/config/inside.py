"""Path checks for untrusted run folders: names and links must stay inside the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from keel_megatron.errors import UserError

_CHECKPOINTS = "checkpoints"


def check_links(folder: Path) -> None:
    """Check that no link in a run's folder points outside it.

    Args:
        folder: the run's folder; its own path may contain links. Checkpoints have a check of
            their own.

    Raises:
        UserError: a link does, even if its target does not exist.
    """
    home = folder.resolve()
    for link in _links(folder):
        place = link.resolve()
        if not place.is_relative_to(home):
            raise UserError(
                f"{link} links to {place}, outside the run's folder, where runs neither read nor "
                "write: replace the link by its target, or move the whole folder "
                "(training.runs_dir)"
            )


def inside(folder: Path, name: str) -> Path | None:
    """Resolve a name in a run's folder, if its target is inside the folder.

    Args:
        folder: the run's folder.
        name: path of a file or folder, relative to the run's folder or absolute.

    Returns:
        The path without links, which may not exist; None if it is outside the folder, contains a
        link that points outside, or is neither a file nor a folder.
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
    """All links in a folder and its subfolders, without following any."""
    for parent, folders, files in os.walk(folder):
        at = Path(parent)
        for name in [*folders, *files]:
            if (at / name).is_symlink():
                yield at / name
        if at.name == _CHECKPOINTS and at.parent == folder:
            folders.clear()
