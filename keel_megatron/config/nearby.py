"""Suggestions for paths that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def nearby(path: Path, pattern: str = "*", others: Iterable[str] = ()) -> str:
    """The end of an error message: a similar name, or nothing if there is none or the path exists.

    Args:
        path: a path that was asked for.
        pattern: glob of the names beside it that can be meant.
        others: further names that can be meant.
    """
    if path.exists():
        return ""
    names = list(others)
    with suppress(OSError):
        names += sorted(str(found) for found in path.parent.glob(pattern))
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""
