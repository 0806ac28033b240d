"""Folders of `datasets.save_to_disk`, and Megatron's .bin and .idx pairs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keel_megatron.config.reading import parse_json, read_small
from keel_megatron.corpus.formats import INDEX_MAGIC
from keel_megatron.corpus.paths import Entry, Given, file_entry
from keel_megatron.corpus.skips import Skips
from keel_megatron.errors import UserError

_DICT = "dataset_dict.json"
_STATE = "state.json"
TRAIN, VALIDATION = "train", "validation"


def is_saved_dataset(folder: str) -> bool:
    """Whether a folder was written by `datasets.save_to_disk`."""
    return any(os.path.isfile(f"{folder}/{name}") for name in (_DICT, _STATE))


def saved_dataset(
    setting: str, given: Given, splits: tuple[str, ...], skips: Skips, say: Callable[[str], None]
) -> list[Entry]:
    """The .arrow files of a dataset, or of some splits of a dataset dictionary.

    Args:
        setting: name of the setting.
        given: the folder.
        splits: splits that are used where they exist; the first must.
        skips: counts the files of other splits.
        say: called with the names of the splits.

    Raises:
        UserError: its description is damaged, the first split is missing, or a file is.
    """
    folder = given.location
    if not os.path.isfile(f"{folder}/{_DICT}"):
        return _saved_split(setting, given, folder)
    listed = _list_in(setting, f"{folder}/{_DICT}", "splits")
    names = [_plain(setting, f"{folder}/{_DICT}", name) for name in listed]
    if splits[0] not in names:
        raise UserError(
            f"{setting}: {folder} has no split `{splits[0]}` (its splits: "
            f"{', '.join(names) or 'none'}); give the folder of a split, such as {folder}/SPLIT"
        )
    found: list[Entry] = []
    for name in names:
        entries = _saved_split(setting, given, f"{folder}/{name}")
        if name in splits:
            found += [entry._replace(validation=name == VALIDATION) for entry in entries]
        else:
            for entry in entries:
                skips.add("of a split that is not used", entry.location, entry.size)
    used = " and ".join(name for name in splits if name in names)
    say(f"{setting}: {folder}: using {used} of the splits {', '.join(names)}")
    return found


def _saved_split(setting: str, given: Given, folder: str) -> list[Entry]:
    """The .arrow files of one split, in order."""
    state = f"{folder}/{_STATE}"
    if _list_in(setting, state, "_indices_data_files", optional=True):
        raise UserError(
            f"{setting}: {folder} stores a selection of rows as indices; save it again with "
            "flatten_indices()"
        )
    found = []
    for record in _list_in(setting, state, "_data_files"):
        name = record.get("filename") if isinstance(record, dict) else None
        location = f"{folder}/{_plain(setting, state, name)}"
        try:
            found.append(file_entry(given, location, kind="huggingface"))
        except OSError as error:
            raise UserError(f"{setting}: {location}: {error.strerror}") from error
    return found


def _list_in(setting: str, path: str, key: str, *, optional: bool = False) -> list[Any]:
    """A list in a description.

    Raises:
        UserError: the description cannot be read, or has no such list.
    """
    try:
        content = parse_json(read_small(Path(path)))
        value = content.get(key) if isinstance(content, dict) else None
        if value is None and optional:
            return []
        if not isinstance(value, list):
            raise ValueError(f"has no list {key!r}")
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{setting}: {path} is damaged ({error}); save the dataset again with save_to_disk"
        ) from error
    return value


def _plain(setting: str, path: str, name: object) -> str:
    """A name in a description, which must not lead out of its folder."""
    if not isinstance(name, str) or not name or "/" in name or "\0" in name or name in (".", ".."):
        raise UserError(f"{setting}: {path} is damaged: {name!r} is not a file name")
    return name


def prefix_of(location: str) -> str | None:
    """The prefix of a .bin and .idx pair, named by the prefix or one of its files."""
    prefix = location.removesuffix(".bin").removesuffix(".idx")
    if not os.path.isfile(f"{prefix}.bin"):
        return None
    try:
        with open(f"{prefix}.idx", "rb") as stream:
            return prefix if stream.read(len(INDEX_MAGIC)) == INDEX_MAGIC else None
    except OSError:
        return None


def pair(given: Given, prefix: str) -> list[Entry]:
    """The .bin and .idx of a prefix."""
    return [file_entry(given, f"{prefix}.{end}", kind="megatron") for end in ("bin", "idx")]


def mark_pairs(entries: list[Entry]) -> list[Entry]:
    """The files of a folder, with .bin and .idx pairs marked as such."""
    ends = (".bin", ".idx")
    if not any(entry.name.endswith(".idx") for entry in entries):
        return entries
    marked = []
    for entry in entries:
        is_pair = entry.location.endswith(ends) and prefix_of(entry.location) is not None
        marked.append(entry._replace(kind="megatron") if is_pair else entry)
    return marked
