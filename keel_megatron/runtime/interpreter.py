"""How this program starts Python processes of its own: with the code that it runs itself.

`python -m` and `python -c` put the working directory first among the places to import from: a
`queue.py` there would take the place of Python's own, another checkout that of the package. `-P`
keeps the folder out. No torch here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import keel_megatron


def python() -> list[str]:
    """The interpreter and its options, for the beginning of a command."""
    return [sys.executable, "-P"]


def environment() -> dict[str, str]:
    """This process's environment, in which the package is found where this process has found it."""
    root = str(Path(keel_megatron.__file__).resolve().parents[1])
    found = os.environ.get("PYTHONPATH")
    if sys.flags.safe_path or not sys.path or os.path.realpath(sys.path[0]) != root:
        return dict(os.environ)
    # `python -m keel_megatron` in a checkout that is not installed.
    return os.environ | {"PYTHONPATH": root if not found else os.pathsep.join([root, found])}
