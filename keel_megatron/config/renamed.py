"""Settings that were renamed: the old names still work in configurations and overrides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keel_megatron.config.bundled import locate
from keel_megatron.config.reading import read_small_text
from keel_megatron.config.yaml_text import read_yaml
from keel_megatron.errors import Problem

RENAMED = {
    "checkpoint.asynchronous": "async_save",
    "data.cache": "cache_dir",
    "deepspeed.bucket_elements": "bucket_size",
}
"""Old path of a setting -> its key now, in the same section."""


def current_key(section: str, key: str) -> str:
    """The key of a setting today."""
    return RENAMED.get(f"{section}.{key}", key)


def rename(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Replace old names in a mapping of sections.

    Returns:
        A mapping with today's names, and a problem for each setting that has both names.
    """
    renamed: dict[str, Any] = {}
    wrong = []
    for section, values in mapping.items():
        renamed[section] = values
        if not isinstance(values, dict):
            continue
        renamed[section] = {}
        for key, value in values.items():
            new = current_key(section, key)
            if new != key and new in values:
                message = f"is the old name of {section}.{new}, which is set as well; remove it"
                wrong.append(Problem(f"{section}.{key}", message))
            else:
                renamed[section][new] = value
    return renamed, wrong


def notices(path: Path | None, overrides: Sequence[str] = ()) -> Iterator[str]:
    """One line for each old name in a configuration file and in overrides.

    A file that cannot be read has none; loading it reports the error.
    """
    try:
        content = read_yaml(read_small_text(locate(path))) if path is not None else {}
    except (OSError, ValueError):
        content = {}
    sections = content if isinstance(content, dict) else {}
    found = [
        f"{section}.{key}"
        for section, values in sections.items()
        for key in (values if isinstance(values, dict) else ())
    ]
    found += [override.partition("=")[0] for override in overrides]
    for old in dict.fromkeys(found):
        if old in RENAMED:
            yield f"{old} is now {old.partition('.')[0]}.{RENAMED[old]}"
