"""A run's folder at a start: who owns it, and what becomes of it when the run is accepted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keel_megatron.checkpoint.resume import ResumePoint
from keel_megatron.errors import UserError
from keel_megatron.runtime import exit_codes, ownership
from keel_megatron.training.run_folder import claim_folder, owned_folder
from keel_megatron.training.stop import StopRequest
from tests.settings import small_config
from tests.training.fakes import Alone


def data_in(folder: Path) -> Any:
    """Prepared data of which only the tokenizer is there."""
    path = folder / "tokenizer.json"
    path.write_bytes(b"model")
    return SimpleNamespace(kept_files=(path,))


def test_a_claimed_folder_has_configuration_and_tokenizer_and_no_earlier_code(
    tmp_path: Path,
) -> None:
    config = small_config(training__runs_dir=str(tmp_path))
    folder = config.training.folder
    folder.mkdir()
    exit_codes.write(folder, exit_codes.SAVED)
    for name in ("tokenizer.model", "chat_template.jinja"):
        (folder / name).write_bytes(b"of an earlier start")
    lineage = claim_folder(config, ResumePoint(), data_in(tmp_path))
    assert not lineage.resumes
    assert not (folder / exit_codes.FILE).exists()
    assert (folder / "config.yaml").is_file()
    assert (folder / "tokenizer.json").read_bytes() == b"model"
    assert not (folder / "tokenizer.model").exists()
    assert not (folder / "chat_template.jinja").exists()


def test_a_folder_that_cannot_be_written_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "test").write_text("a file in its place")
    config = small_config(training__runs_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"^training.runs_dir: cannot write"):
        claim_folder(config, ResumePoint(), data_in(tmp_path))


def test_the_folder_is_owned_within_the_block_and_free_after_it(tmp_path: Path) -> None:
    folder, stop, runtime = tmp_path / "run", StopRequest(), Alone()
    with owned_folder(folder, runtime, stop):  # type: ignore[arg-type]
        assert (folder / ownership.FILE).is_file()
        assert stop.last_word is not None
        with pytest.raises(UserError), ownership.take(folder):
            pass
    assert not (folder / ownership.FILE).exists()
