"""The sources of a run: files of `data.text` or `data.sources`, or the demo corpus."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from keel_megatron.config.data import DataConfig, Format, SourceConfig
from keel_megatron.corpus.dataset_folders import (
    TRAIN,
    VALIDATION,
    is_saved_dataset,
    mark_pairs,
    pair,
    prefix_of,
    saved_dataset,
)
from keel_megatron.corpus.demo import demo_entries, demo_root
from keel_megatron.corpus.documents import Compression, Source, SourceFile
from keel_megatron.corpus.formats import RefusedError, classify
from keel_megatron.corpus.packages import optional
from keel_megatron.corpus.paths import (
    Entry,
    Given,
    Walk,
    cannot_read,
    expand,
    file_entry,
    is_folder,
)
from keel_megatron.corpus.skips import BLANK, Skips, printable, report, suffix_of
from keel_megatron.data.manifest import MANIFEST
from keel_megatron.errors import UserError

DEMO = "demo"
"""Name of the demo corpus's source."""
TEXT = "text"
"""Name of the source of `data.text`."""
_SECONDS_BETWEEN_LINES = 5.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Listing:
    """The files of all sources, before any is opened."""

    parts: tuple[_Listed, ...]

    def key(self) -> str:
        """SHA-256 of names, sizes, modification times and settings of all files.

        It finds what is known of these files without reading them again.
        """
        found = hashlib.sha256()
        for part in self.parts:
            found.update(repr(part.wanted.model_dump(mode="json")).encode())
            for entry in part.entries:
                line = (entry.location, entry.name, entry.size, entry.mtime_ns, entry.validation)
                found.update(json.dumps(line).encode())
        return found.hexdigest()


@dataclass(frozen=True)
class _Listed:
    """The files of one source."""

    wanted: SourceConfig
    name: str
    setting: str
    description: str
    entries: list[Entry]
    skips: Skips


def list_files(data: DataConfig, say: Say) -> Listing:
    """List the files of each source, without opening them.

    A file that is reached twice is taken once, and belongs to the validation set if it is among
    its files.

    Args:
        data: the settings.
        say: called with progress messages.

    Raises:
        UserError: a path is missing or unreadable, or data.dataset is given without sources.
    """
    check_buildable(data)
    parts = []
    for setting, name, wanted in _wanted(data):
        skips = Skips()
        if data.text is None and data.sources is None:
            entries, description = demo_entries(), f"the Python standard library ({demo_root()})"
        else:
            entries = _entries(setting, wanted, skips, say)
            description = ", ".join(str(path) for path in wanted.path)
        parts.append(_Listed(wanted, name, setting, description, entries, skips))
    return Listing(tuple(parts))


def check_buildable(data: DataConfig) -> None:
    """Check that the settings say from what data.dataset can be built, if it is given.

    Raises:
        UserError: they do not.
    """
    if data.dataset is None:
        return
    if (data.dataset / MANIFEST).is_file():
        state = "is a dataset already"
    else:
        state = "is not a dataset folder" if data.dataset.exists() else "does not exist"
    if data.sources is None:
        raise UserError(
            f"data.dataset: {data.dataset} {state}, and data.text or data.sources do not say what "
            "to build it from; correct the path"
        )
    for number, source in enumerate(data.sources):
        if not source.path:
            raise UserError(
                f"data.sources.{number}: {source.name or 'the entry'} has no path, and "
                f"data.dataset {data.dataset} {state}; give it a path to build from, or "
                "correct data.dataset"
            )


def find_source(setting: str, wanted: SourceConfig, say: Say) -> Source:
    """The files of one source, with their formats.

    Args:
        setting: its name, for messages.
        wanted: its paths.
        say: called with messages: what is skipped, and progress.

    Raises:
        UserError: as `list_files` and `examine`.
    """
    skips = Skips()
    entries = _entries(setting, wanted, skips, say)
    description = ", ".join(map(str, wanted.path))
    return _examined(_Listed(wanted, TEXT, setting, description, entries, skips), say)


def check_paths(data: DataConfig) -> None:
    """Check quickly, without reading files, that all sources can be found.

    Raises:
        UserError: a path is missing or unreadable, or a source has only empty files.
    """
    if data.dataset is not None or (data.text is None and data.sources is None):
        return
    for setting, _, wanted in _wanted(data):
        for name, paths in ((setting, wanted.path), (f"{setting}.validation", wanted.validation)):
            has_files = [_has_files(name, path) for path in paths or ()]  # each path is checked
            if paths and not any(has_files):
                raise _no_text(name, ", ".join(map(str, paths)))


def _wanted(data: DataConfig) -> list[tuple[str, str, SourceConfig]]:
    """(setting, name, entry) of each source.

    Raises:
        UserError: two sources have the same name.
    """
    if data.sources is None:
        name = DEMO if data.text is None else TEXT
        return [("data.text", name, SourceConfig(name=name, path=data.text or ()))]
    taken = [source.name for source in data.sources if source.name is not None]
    twice = [name for name in taken if taken.count(name) > 1]
    if twice:
        raise UserError(f"data.sources: two entries have the name {twice[0]!r}")
    found = []
    for number, source in enumerate(data.sources):
        name = source.name or _free(_name_of(source.path[0]), taken, "-")
        taken.append(name)
        found.append((f"data.sources.{number}", name, source))
    return found


def _name_of(path: Path) -> str:
    """The name of a source: the last part of its path that is not a pattern, without suffixes."""
    parts = [part for part in path.parts if not re.search(r"[*?\[]", part) and part != "/"]
    last = parts[-1] if parts else ""
    while suffix_of(last):
        last = last[: -len(suffix_of(last))]
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", last).lstrip("._-")[:60]
    return name or "source"


def _free(name: str, taken: Iterable[str], mark: str) -> str:
    """The name, numbered if it is taken."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}{mark}{number}"
    return free


def _entries(setting: str, wanted: SourceConfig, skips: Skips, say: Say) -> list[Entry]:
    """The files of a source, each once, with unique names; its own validation files at the end."""
    own = wanted.validation or ()
    splits = (TRAIN,) if own else (TRAIN, VALIDATION)
    main = [
        entry
        for path in wanted.path
        for entry in _entries_of(setting, path, wanted.format, splits, skips, say)
    ]
    validation = [
        entry._replace(validation=True)
        for path in own
        for entry in _entries_of(
            f"{setting}.validation", path, wanted.format, (VALIDATION,), skips, say
        )
    ]
    # A text must not be trained on and validated with.
    taken = {entry.identity for entry in validation}
    once = {e.identity: e for e in reversed(main) if e.identity not in taken}
    main = list(reversed(once.values()))
    validation = list(reversed({e.identity: e for e in reversed(validation)}.values()))
    return _named_apart(main + validation)


def _entries_of(
    setting: str, path: Path, wanted: Format, splits: tuple[str, ...], skips: Skips, say: Say
) -> Iterator[Entry]:
    """The files of one path; of a dataset dictionary those of some splits."""
    for given in expand(setting, path):
        location = given.location
        try:
            prefix = prefix_of(location) if wanted in ("auto", "megatron") else None
            if prefix and not (wanted == "auto" and os.path.isdir(location)):
                yield from pair(given, prefix)
            elif wanted == "megatron" and not os.path.isdir(location):
                raise UserError(
                    f"{setting}: {printable(location)} is not a prefix of a .bin and .idx pair of "
                    "Megatron-core"
                )
            elif not is_folder(setting, location):
                yield file_entry(given, location)
            elif wanted in ("auto", "huggingface") and is_saved_dataset(location):
                yield from saved_dataset(setting, _rooted(given), splits, skips, say)
            else:
                yield from mark_pairs(Walk(_rooted(given), skips, say).entries())
        except OSError as error:
            raise cannot_read(setting, location, error) from error


def _rooted(given: Given) -> Given:
    """A folder, with names relative to it, or to the fixed part of the glob that matched it."""
    return replace(given, root=given.location) if given.origin == "named" else given


def _named_apart(entries: list[Entry]) -> list[Entry]:
    """The entries with equal names numbered: a name determines the side of the split."""
    taken: set[str] = set()
    apart = []
    for entry in entries:
        name = _free(entry.name, taken, "~")
        taken.add(name)
        apart.append(entry if name == entry.name else entry._replace(name=name))
    return apart


def _has_files(setting: str, path: Path) -> bool:
    """Whether there is a readable file that is not empty at a path."""
    for given in expand(setting, path):
        location = given.location
        try:
            if prefix_of(location):
                return True
            if is_folder(setting, location):
                if any(Walk(_rooted(given), Skips(), lambda _text: None).batches()):
                    return True
            else:
                with open(location, "rb") as stream:
                    if stream.read(1):
                        return True
        except OSError as error:
            raise cannot_read(setting, location, error) from error
    return False


def _no_text(setting: str, where: str) -> UserError:
    return UserError(
        f"{setting}: there is no text in {where}; give files or folders with UTF-8 text"
    )


def examine(listing: Listing, say: Say) -> list[Source]:
    """Determine the format of each listed file.

    In a folder or glob, files that are not read are skipped and counted; a file that is named
    itself must be readable.

    Args:
        listing: the files.
        say: called with messages: what is skipped, and progress.

    Raises:
        UserError: a named file is not of a format that is read, a package that reads it is
            missing, or a source has no text.
    """
    return [_examined(part, say) for part in listing.parts]


def _examined(part: _Listed, say: Say) -> Source:
    """One source."""
    files = tuple(_source_files(part, say))
    skipped = part.skips.entries()
    if part.name != DEMO or part.wanted.path:
        report(part.setting, part.description, skipped, sum(file.size for file in files), say)
    if not any(file.part == "both" for file in files):
        raise _no_text(part.setting, part.description)
    if part.wanted.validation and not any(file.part == "validation" for file in files):
        raise _no_text(f"{part.setting}.validation", ", ".join(map(str, part.wanted.validation)))
    kinds = {file.kind for file in files}
    if "megatron" in kinds and len(kinds) > 1:
        first = next(file for file in files if file.kind == "megatron")
        raise UserError(
            f"{part.setting}: {part.description} contains .bin and .idx pairs, such as "
            f"{first.location}, and other files; make the pairs a separate source in "
            "data.sources"
        )
    if kinds & {"parquet", "huggingface"}:
        optional("pyarrow", f"{part.setting}: reading {' and '.join(sorted(kinds))}")
    return Source(
        name=part.name,
        kind=kinds.pop() if len(kinds) == 1 else "mixed",
        text_key=part.wanted.text_key,
        weight=part.wanted.weight,
        files=files,
        skipped=skipped,
        description=part.description,
        setting=part.setting,
    )


def _source_files(part: _Listed, say: Say) -> Iterator[SourceFile]:
    """The files that are taken; the others are counted.

    Raises:
        UserError: a file that was named itself is not taken.
    """
    wanted, said = part.wanted, time.monotonic()
    for number, entry in enumerate(part.entries):
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            say(f"{part.setting}: examined {number:,} of {len(part.entries):,} files")
        kind = entry.kind
        compression: Compression = ""
        if kind is None:
            try:
                kind, compression = classify(
                    entry.location,
                    entry.size,
                    wanted.format,
                    wanted.text_key,
                    named=entry.origin != "folder",
                )
            except RefusedError as refused:
                if entry.origin == "named" and refused.reason != BLANK:
                    raise UserError(
                        f"{part.setting}: {printable(entry.location)} {refused.detail}"
                    ) from None
                part.skips.add(refused.reason, entry.location, entry.size)
                continue
        yield SourceFile(
            source=part.name,
            name=entry.name,
            location=entry.location,
            size=entry.size,
            kind=kind,
            compression=compression,
            text_key=wanted.text_key,
            part="validation" if entry.validation else "both",
        )
