"""What a run takes over from its checkpoint when it begins."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keel_megatron.checkpoint.resume import Found
from keel_megatron.runtime import exit_codes
from keel_megatron.training import run
from tests.settings import small_config


def data_in(folder: Path) -> Any:
    """Prepared data of which only the tokenizer is there."""
    (folder / "tokenizer").write_bytes(b"model")
    return SimpleNamespace(tokenizer_path=folder / "tokenizer")


def test_the_code_of_an_earlier_start_is_gone(tmp_path: Path) -> None:
    config = small_config(training__runs_dir=str(tmp_path))
    config.training.folder.mkdir()
    exit_codes.write(config.training.folder, exit_codes.SAVED)
    run._claim(config, Found(), data_in(tmp_path))
    assert not (config.training.folder / exit_codes.FILE).exists()


def test_a_picture_that_cannot_be_drawn_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(training__runs_dir=str(tmp_path))
    said: list[str] = []

    def fail(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "plot_loss", fail)
    loop: Any = SimpleNamespace(position=SimpleNamespace(step=4), validation_loss=math.nan)
    runtime: Any = SimpleNamespace(is_main=True)
    tracker: Any = SimpleNamespace(say=said.append)
    run._conclude(config, runtime, tracker, SimpleNamespace(unigram_entropy=2.0), loop)  # type: ignore[arg-type]
    assert any(line.startswith(f"cannot draw {tmp_path}/test/loss.png: OSError") for line in said)
    assert said[0] == "validation loss nan nats per token; unigram entropy 2.000"


def test_an_exit_code_is_written_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_codes.write(tmp_path, 75)
    assert [path.name for path in tmp_path.iterdir()] == ["exit_code"]
    assert (tmp_path / "exit_code").read_text() == "75\n"
    exit_codes.write(tmp_path / "gone", 0)
    assert "cannot write" in capsys.readouterr().err
