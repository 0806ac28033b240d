"""Files, folders and globs: the files that a setting names, before any is opened.

Folders may hold millions of files: `os.scandir` and text, no `Path` for each.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from keel_megatron.corpus.documents import Kind
from keel_megatron.corpus.skips import BROKEN, HIDDEN, SPECIAL, UNREADABLE, Skips, printable
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import NO_ROOM

_SECONDS_BETWEEN_LINES = 5.0


class Entry(NamedTuple):  # created several times faster than a frozen dataclass
    """A file that was found."""

    location: str
    """Its path, as reached from the given one."""
    name: str
    """Relative to the given folder, or the file name."""
    size: int
    mtime_ns: int
    identity: str
    """Its path without links."""
    origin: Literal["named", "glob", "folder"]
    """How it was given: by its own path, by a glob that matches it, by a folder above it."""
    kind: Kind | None = None
    """Known by its place: a file of a dataset folder or of a prefix."""
    validation: bool = False
    """Belongs to the validation split of a dataset folder."""


@dataclass(frozen=True)
class Given:
    """One path that a setting or its glob names."""

    location: str
    root: str
    """Names are relative to this folder."""
    origin: Literal["named", "glob"]


def expand(setting: str, path: Path) -> list[Given]:
    """The path, or all matches of a glob in order.

    Raises:
        UserError: nothing matches.
    """
    location = str(path)
    if not glob.has_magic(location) or os.path.lexists(location):
        return [Given(location, os.path.dirname(location), "named")]
    root = location
    while glob.has_magic(root):
        root = os.path.dirname(root)
    matches = sorted(glob.iglob(location, recursive=True), key=_by_parts)
    if not matches:
        raise UserError(f"{setting}: no file matches {location}")
    return [Given(match.rstrip("/"), root, "glob") for match in matches if match.rstrip("/")]


def _by_parts(location: str) -> str:
    """Sorting key: the order of `Path`s, part by part."""
    return location.replace("/", "\0")


def is_folder(setting: str, location: str) -> bool:
    """Whether a path is a folder; otherwise it is a file.

    Raises:
        UserError: it is neither, is missing, or cannot be examined.
    """
    try:
        Path(location).stat()
    except FileNotFoundError:
        raise UserError(f"{setting}: {printable(location)} does not exist") from None
    except OSError as error:
        raise cannot_read(setting, location, error) from error
    if not os.path.isdir(location) and not os.path.isfile(location):
        raise UserError(f"{setting}: {printable(location)} is neither a file nor a folder")
    return os.path.isdir(location)


def cannot_read(setting: str, location: str, error: OSError) -> UserError:
    """The error for a path that cannot be read."""
    return UserError(f"{setting}: {printable(location)} cannot be read: {error.strerror or error}")


def failed(error: OSError, *folders: Path, setting: str | None = None) -> UserError:
    """The error for a build that an error of the system ended.

    Args:
        error: the error, of a file of the build or of a source.
        folders: those that the build writes.
        setting: where they are given.
    """
    reason = error.strerror or error
    prefix = f"{setting}: " if setting else ""
    if isinstance(error.filename, str):
        if any(Path(error.filename).is_relative_to(folder) for folder in folders):
            return UserError(f"{prefix}cannot write {printable(error.filename)}: {reason}")
        return UserError(f"data: {printable(error.filename)}: {reason}")
    verb = "write" if error.errno in NO_ROOM else "build"  # a failed read names no file either
    return UserError(f"{prefix}cannot {verb} {folders[-1]}: {reason}")


def file_entry(
    given: Given, location: str, *, kind: Kind | None = None, validation: bool = False
) -> Entry:
    """The entry of one file.

    Raises:
        OSError: it cannot be examined.
    """
    state = os.stat(location)
    name = os.path.relpath(location, given.root) if given.root else location
    return Entry(
        location,
        printable(name),
        state.st_size,
        state.st_mtime_ns,
        os.path.realpath(location),
        given.origin,
        kind,
        validation,
    )


class Walk:
    """All files below a folder; links to folders are followed.

    Each folder is entered once, so cycles of links end; by its own path if that is below the root.

    Args:
        given: the folder; names are relative to its `root`.
        skips: counts hidden and unreadable paths.
        say: called with the number of files every few seconds.
    """

    def __init__(self, given: Given, skips: Skips, say: Callable[[str], None]) -> None:
        self._given = given
        self._skips = skips
        self._say = say
        self._entered: set[tuple[int, int]] = set()
        self._said = time.monotonic()

    def entries(self) -> list[Entry]:
        """The files, sorted by path.

        Raises:
            OSError: the folder itself cannot be read.
        """
        found: list[Entry] = []
        for batch in self.batches():
            found.extend(batch)
            if time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
                self._said = time.monotonic()
                self._say(f"listing {self._given.location}: {len(found):,} files so far")
        found.sort(key=lambda entry: _by_parts(entry.location))
        return found

    def batches(self) -> Iterator[list[Entry]]:
        """The files of one folder after the other, in no particular order.

        Raises:
            OSError: the folder itself cannot be read.
        """
        root = self._given.location
        folders, links = [root], list[str]()
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            try:
                state = os.stat(folder)
                if (state.st_dev, state.st_ino) in self._entered:
                    continue
                self._entered.add((state.st_dev, state.st_ino))
                yield self._files_of(folder, folders, links)
            except OSError:
                if folder == root:
                    raise
                self._skips.add(UNREADABLE, folder)
            links.sort(key=_by_parts)

    def _files_of(self, folder: str, folders: list[str], links: list[str]) -> list[Entry]:
        """The files of a folder; its folders are added to the lists."""
        real = os.path.realpath(folder)
        is_real = real == folder
        given, found = self._given, list[Entry]()
        base = len(given.root) + 1 if given.root not in ("", "/") else len(given.root)
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name, reverse=True)
        while entries:
            entry = entries.pop()  # freed with what it remembers, larger than an Entry
            location = f"{folder}/{entry.name}"
            if entry.name.startswith("."):
                self._skips.add(HIDDEN, location, _size(entry))
                continue
            is_link = entry.is_symlink()
            try:
                if entry.is_dir():
                    (links if is_link else folders).append(location)
                elif entry.is_file():
                    state = entry.stat()
                    size, mtime, name = state.st_size, state.st_mtime_ns, location[base:]
                    if is_link:
                        identity = os.path.realpath(location)
                    else:
                        identity = location if is_real else f"{real}/{entry.name}"
                    found.append(Entry(location, printable(name), size, mtime, identity, "folder"))
                else:
                    self._skips.add(BROKEN if is_link else SPECIAL, location)
            except OSError:
                self._skips.add(UNREADABLE, location)
        return found


def _size(entry: os.DirEntry[str]) -> int:
    """Bytes of a file; 0 of anything else."""
    try:
        return entry.stat().st_size if entry.is_file() else 0
    except OSError:
        return 0
