"""Whose a checkpoint is, is seen before it is used."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from keel_megatron.checkpoint import folder, manifest, resume
from keel_megatron.checkpoint.identity import claim
from keel_megatron.config.load import dump_config
from tests.checkpoint.samples import write_checkpoint
from tests.settings import small_config


@pytest.mark.security
def test_another_runs_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    config = small_config(training__runs_dir=str(tmp_path))
    claim(config)
    run = config.training.folder
    path = write_checkpoint(run, 10)

    def save_of(**overrides: object) -> None:
        text = dump_config(small_config(**overrides)).encode()
        files = manifest.read_manifest(path)
        files["config.yaml"] = manifest.write_checked(path / "config.yaml", [text])
        assert asdict(files["config.yaml"])["bytes"] == len(text)
        manifest.write_manifest(path, 10, files)

    save_of(training__steps=77)
    assert resume._outline(path, run)[0] is None
    save_of(model__blocks=config.model.blocks * 2)
    problem = resume._outline(path, run)[0]
    assert problem is not None
    assert problem.startswith("it belongs to another run: model.blocks is ")
    assert folder.steps(run) == [10]
