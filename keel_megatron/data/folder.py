"""The files of a folder of text, and what of it is left out and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class LeftOut:
    """What of a folder is no text of a run's, by reason."""

    root: Path
    found: dict[str, list[Path]] = field(default_factory=dict)

    def add(self, reason: str, path: Path) -> None:
        """Count one."""
        self.found.setdefault(reason, []).append(path)

    def text(self) -> str:
        """All of it in one line, an example each; empty if it is nothing."""
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
    """Every file below a folder, in order of their paths; links to folders are followed.

    A folder is entered once, whatever links lead to it, so cycles end; by its own path where that
    is below `root`, too.

    Args:
        root: the folder.
        left_out: told of what is hidden or cannot be entered.
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
    """(path, whether it is a folder, whether it is a link) of what is not left out."""
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
