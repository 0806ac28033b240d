"""Text that the data tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some real text: a few modules of the standard library."""
    import argparse
    import ast
    import datetime
    import tarfile

    folder = tmp_path_factory.mktemp("text")
    for module in (argparse, ast, datetime, tarfile):
        (folder / f"{module.__name__}.py").write_text(Path(module.__file__).read_text())
    return folder
