"""The files below a folder of text, and those that are skipped, with reasons."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class LeftOut:
    """Skipped paths of a folder, by reason."""

    root: Path
    found: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, reason: str, path: Path) -> None:
        """Count a path."""
        self.found.setdefault(reason, []).append(path)

    def text(self) -> str:
        """One line with counts and an example per reason; empty if nothing was skipped."""
        return ", ".join(
            f"{len(paths):,} {reason} (such as {paths[0].relative_to(self.root)})"
            for reason, paths in self.found.items()
        )


NOT_TEXT = "not readable UTF-8 text"
HIDDEN = "hidden"
BROKEN = "broken link"
UNREADABLE = "unreadable folder"
SPECIAL = "neither file nor folder"


def files_below(root: Path, left_out: LeftOut) -> list[Path]:
    """All files below a folder, sorted by path; links to folders are followed.

    Each folder is entered once, so cycles of links end; by its own path if that is below `root`.

    Args:
        root: the folder.
        left_out: collects hidden and unreadable paths.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            state = folder.stat()
            if (state.st_dev, state.st_ino) in entered:
                continue
            entered.add((state.st_dev, state.st_ino))
            entries = list(_entries(folder, left_out))
        except OSError:
            if folder == root:
                raise
            left_out.add(UNREADABLE, folder)
            continue
        for path, is_folder, is_link in entries:
            if not is_folder:
                found.append(path)
            elif is_link:
                links.append(path)
            else:
                folders.append(path)
        links.sort()
    return sorted(found)


def _entries(folder: Path, left_out: LeftOut) -> Iterator[tuple[Path, bool, bool]]:
    """(path, whether it is a folder, whether it is a link) of the entries that are not skipped."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith("."):
                left_out.add(HIDDEN, path)
            elif entry.is_dir() or entry.is_file():
                yield path, entry.is_dir(), entry.is_symlink()
            elif entry.is_symlink():
                left_out.add(BROKEN, path)
            else:
                left_out.add(SPECIAL, path)
