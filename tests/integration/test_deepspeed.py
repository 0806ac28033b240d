"""`keel train` on DeepSpeed, as a user runs it: one process, no launcher, then the other engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.engines.deepspeed.ranks import needs_deepspeed, zero
from tests.integration.commands import keel, write_config

pytestmark = needs_deepspeed


TEXT = Path(torch.__file__)


@pytest.mark.slow
def test_a_run_trains_generates_and_goes_on_with_the_other_engine(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        TEXT,
        **zero(3, offload=True, parameters=True),
        model__blocks=2,
        guard__action="rollback",
        checkpoint__every=2,
    )
    before = {path.name for path in tmp_path.iterdir()}
    done = keel(tmp_path, "train", str(config))
    assert done.returncode == 0, done.stderr
    for noise in ("[INFO]", "[WARNING]", "Warning", "ds_accelerator", "Rank 0"):
        assert noise not in done.stdout + done.stderr, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} - before == {"runs", "data"}
    said = keel(tmp_path, "generate", "runs/test", "--prompt", "def ", "--max-new-tokens", "4")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("def ")
    on = ("training.steps=8", "training.engine=megatron", "parallel.pipeline=2")
    again = keel(tmp_path, "train", str(config), *on, "--processes", "2")
    assert again.returncode == 0, again.stderr
    assert "resuming from runs/test/checkpoints/step_00000006" in again.stdout


def test_without_the_package_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "deepspeed.py").write_text("raise ImportError('No module named deepspeed')\n")
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(absent), *([known] if known else [])]))
    config = write_config(tmp_path, TEXT, training__engine="deepspeed", model__blocks=2)
    done = keel(tmp_path, "train", str(config), fresh=True)
    assert done.returncode == 2
    assert "DS_BUILD_OPS=0 pip install --no-build-isolation" in done.stderr
    assert "Traceback" not in done.stderr
