"""Identity of a run's data, by hash: a run never resumes with different data unnoticed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel_megatron.config.reading import LARGE, parse_json, read_small
from keel_megatron.errors import UserError

SOURCES = "sources.json"
_SHOWN = 5

Sources = Mapping[str, list[Any]]
"""Size and SHA-256 of each text file, by name."""


def file_record(path: Path) -> dict[str, Any]:
    """Size, SHA-256 and modification time of a file."""
    state = path.stat()
    return {"bytes": state.st_size, "sha256": _sha256(path), "mtime_ns": state.st_mtime_ns}


def is_unchanged(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file equals its record.

    As in git, it is hashed only if its modification time changed: hashing terabytes of tokens at
    every start would take hours.
    """
    if not path.is_file() or path.stat().st_size != record["bytes"]:
        return False
    return path.stat().st_mtime_ns == record["mtime_ns"] or _sha256(path) == record["sha256"]


def refuse_other_text(
    expected: Mapping[str, Any], found: Mapping[str, Any], cache: Path, sources: Sources
) -> None:
    """Refuse a corpus or tokenizer other than that of the run's previous training.

    Args:
        expected: the identity in the checkpoint.
        found: the identity of the current data.
        cache: folder of the prepared data; its list of texts shows the differences.
        sources: the current text files.

    Raises:
        UserError: they differ.
    """
    if expected["fingerprint"] == found["fingerprint"]:
        return
    if expected["corpus"] == found["corpus"]:
        raise UserError(
            "data.tokenizer: not the tokenizer that the run was trained with "
            f"({_given(expected['tokenizer'])} then, {_given(found['tokenizer'])} now); restore "
            "it, or use the new one under another training.name, which starts with new "
            "weights"
        )
    raise UserError(
        "data.text: not the data that the run was trained on: "
        f"{_text_difference(expected, found, cache, sources)}. A run resumes only "
        "with the same data (its path may change): restore it, or train on the new data under "
        "another training.name, which starts with new weights"
    )


def refuse_other_files(expected: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    """Refuse prepared files other than those of the run's previous training.

    Args:
        expected: the identity in the checkpoint.
        found: the identity of the prepared data.
        folder: folder of the prepared data.

    Raises:
        UserError: they differ.
    """
    for name, then in expected["files"].items():
        now = found["files"].get(name)
        if now != then:
            raise UserError(
                f"data.cache_dir: {folder / name} is not what the run was trained on: "
                f"{_file_text(then)} then, {_file_text(now)} now, from the same text; other "
                "versions of sentencepiece or megatron-core may prepare it otherwise. Restore that "
                "folder or those versions, or train under another training.name, which begins with "
                "new weights"
            )


def _given(digest: str | None) -> str:
    return "none was given" if digest is None else f"SHA-256 {digest[:12]}"


def _file_text(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "absent"
    return f"{record['bytes']} bytes with SHA-256 {record['sha256'][:12]}"


def _text_difference(
    expected: Mapping[str, Any], found: Mapping[str, Any], cache: Path, sources: Sources
) -> str:
    try:
        path = cache / expected["fingerprint"][:16] / SOURCES
        before: Sources = {
            name: [record[0], record[1]]
            for name, record in parse_json(read_small(path, LARGE)).items()
        }
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return f"SHA-256 {expected['corpus'][:12]} then, {found['corpus'][:12]} now"
    lines = [f"{name} is missing" for name in before.keys() - sources.keys()]
    lines += [f"{name} is new" for name in sources.keys() - before.keys()]
    lines += [
        f"{name} changed ({before[name][0]} bytes then, {sources[name][0]} now)"
        for name in before.keys() & sources.keys()
        if before[name] != sources[name]
    ]
    lines.sort()
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ", ".join(lines[:_SHOWN]) + more


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
