"""Command and environment of Python subprocesses, which must import the same code.

`python -m` and `python -c` put the working directory first on the import path: a `queue.py` there
would replace the standard module, another checkout this package. `-P` prevents that. Does not
import torch.
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
    """This process's environment, with the package's location on the import path."""
    root = str(Path(keel_megatron.__file__).resolve().parents[1])
    found = os.environ.get("PYTHONPATH")
    if sys.flags.safe_path or not sys.path or os.path.realpath(sys.path[0]) != root:
        return dict(os.environ)
    # `python -m keel_megatron` in a checkout that is not installed.
    return os.environ | {"PYTHONPATH": root if not found else os.pathsep.join([root, found])}
