"""What somebody has planted in a run's folder is not executed when the run goes on."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.commands import keel, write_config

pytestmark = pytest.mark.security


class Mark:
    """A pickle that leaves a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.slow
def test_pickles_among_the_compiled_graphs_leave_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry of a true cache replaced, under the names that the same run asks for again."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    config = write_config(tmp_path, Path(argparse.__file__))
    settings = ("kernels.compile=true", "--processes", "1")
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "mine"))
    first = keel(tmp_path, "train", str(config), "training.steps=1", *settings)
    assert first.returncode == 0, first.stderr
    planted = tmp_path / "runs" / "test" / "compiled"
    if not planted.exists():
        shutil.copytree(tmp_path / "mine" / "compiled", planted)
    pickles = [path for path in planted.glob("*/*/*") if path.is_file()]
    pickles += [path for path in planted.glob("*/*/*/*") if path.is_file()]
    assert len(pickles) > 2
    for path in pickles:
        path.write_bytes(pickle.dumps(Mark(tmp_path / "mark")))
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "new"))
    again = keel(tmp_path, "train", str(config), "training.steps=2", *settings)
    assert again.returncode == 0, again.stderr
    assert not (tmp_path / "mark").exists()
    assert (tmp_path / "new" / "compiled" / "aotautograd").is_dir()
