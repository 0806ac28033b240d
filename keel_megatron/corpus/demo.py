"""The demo corpus: the sources of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from keel_megatron.corpus.paths import Entry, Given, file_entry

_WITHOUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "ensurepip",
}


def demo_root() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def demo_entries() -> list[Entry]:
    """Its modules, without tests and vendored packages, sorted by path."""
    root = demo_root()
    given = Given(str(root), str(root), "glob")
    return [
        file_entry(given, str(path))
        for path in sorted(root.rglob("*.py"))
        if not _WITHOUT.intersection(path.relative_to(root).parts)
    ]
