"""Finds runs' folders, and reads their settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from keel_megatron.config.reading import read_small_text
from keel_megatron.config.yaml_text import check_structure
from keel_megatron.errors import UserError

_MARKS = ("config.yaml", "metrics.jsonl", "log.txt")
# The C loader is 20 times as fast, which matters with fifty runs.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def is_run(folder: Path) -> bool:
    """Whether a folder contains a run."""
    try:
        return any((folder / name).is_file() for name in _MARKS)
    except PermissionError:  # `keel runs` reports it
        return True


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs in folders, each a run's folder or a folder of runs.

    Raises:
        UserError: one of them is neither.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if is_run(path):
            inside = [path]
        elif path.is_dir():
            inside = _inside(path)
        else:
            what = "is no folder" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}: give a run's folder, or the folder of runs")
        if not inside:
            raise UserError(f"{path} contains no runs: `keel train CONFIG` creates one in runs/")
        found |= {folder.resolve(): folder for folder in inside}
    return list(found.values())


def _inside(path: Path) -> list[Path]:
    try:
        return sorted(folder for folder in path.iterdir() if is_run(folder))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def saved_settings(folder: Path) -> dict[str, Any]:
    """`read_settings`; empty if they cannot be read."""
    try:
        return read_settings(folder)
    except ValueError:
        return {}


def read_settings(folder: Path) -> dict[str, Any]:
    """A run's config.yaml by section, not validated; empty if there is none.

    Runs of older versions are listed too.

    Raises:
        ValueError: it cannot be read; the message has one line.
    """
    try:
        text = read_small_text(folder / "config.yaml")
        check_structure(text, _LOADER)
        found = yaml.load(text, _LOADER)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"config.yaml cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"config.yaml cannot be read: {why}") from None
    sections = found if isinstance(found, dict) else {}
    return {name: values for name, values in sections.items() if isinstance(values, dict)}
