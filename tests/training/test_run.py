"""What a run takes over from its checkpoint before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.checkpoint.find import Found
from keel_megatron.checkpoint.identity import claim
from keel_megatron.config import UserError, dump_config
from keel_megatron.tracking.target import remembered_run_id
from keel_megatron.training.run import _check_checkpoint
from tests.settings import small_config


def test_the_mlflow_run_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    config = small_config(training__runs_dir=str(tmp_path))
    claim(config)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    found = Found(tmp_path, {"extras": {"mlflow_run_id": "feed"}})
    _check_checkpoint(config, found)
    assert remembered_run_id(config.training.folder) == "feed"
    _check_checkpoint(config, Found(tmp_path, {"extras": {"mlflow_run_id": "other"}}))
    assert remembered_run_id(config.training.folder) == "feed"


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    config = small_config(training__runs_dir=str(tmp_path))
    (tmp_path / "config.yaml").write_text(dump_config(small_config(model__blocks=4)))
    with pytest.raises(UserError, match=r"model\.blocks: 4 there, 8 now"):
        _check_checkpoint(config, Found(tmp_path, {"extras": {}}))
