"""Generating needs a run's folder, or a checkpoint's, and nothing else."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.config import UserError
from keel_megatron.inference import generate, sample, source
from keel_megatron.inference.generate import generate_from_run
from keel_megatron.inference.sampling import Sampling
from tests.earlier import as_earlier, without_tokenizers
from tests.integration.commands import keel, write_config

TOKENIZER = "tokenizer.model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and then moved away from its text and its prepared data."""
    home = tmp_path_factory.mktemp("home")
    text = home / "text.py"
    text.write_text(Path(argparse.__file__).read_text())
    write_config(
        home,
        text,
        training__precision="fp32",
        model__blocks=2,
        checkpoint__every=1,
        tracking__sample_prompt="def ",
    )
    done = keel(home, "train", "run.yaml", "training.steps=2", "training.validation_sequences=4")
    assert done.returncode == 0, done.stderr
    assert "sample (runs/test/samples.txt)" in done.stdout
    moved = tmp_path_factory.mktemp("moved") / "run"
    shutil.move(home / "runs" / "test", moved)
    shutil.move(home / "data", moved.parent / "prepared")
    shutil.rmtree(home)
    return moved


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, seen from an empty working directory in which nothing may appear."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return copy


def text_of(path: Path, prompt: str = "def f") -> str:
    return generate_from_run(path, prompt, Sampling(3, temperature=0, slide=True))


def test_neither_text_nor_prepared_data_is_needed(run: Path) -> None:
    assert text_of(run).startswith("def f")
    assert list(Path.cwd().iterdir()) == []
    assert (run / TOKENIZER).read_bytes() == (folder.step_folder(run, 2) / TOKENIZER).read_bytes()


def test_any_checkpoint_can_be_named_wherever_it_lies(run: Path, tmp_path: Path) -> None:
    newest = text_of(run)
    assert text_of(folder.step_folder(run, 2)) == newest
    alone = tmp_path / "alone"
    shutil.move(folder.step_folder(run, 2), alone)
    assert text_of(alone) == newest
    assert text_of(run) == text_of(folder.step_folder(run, 1))  # the newest that is left
    victim = alone / manifest.shards_name(0)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"alone is damaged: rank_00000\.safetensors has checksum"):
        text_of(alone)


def test_of_a_longer_prompt_the_end_counts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x = 1\n" * 200
    text = text_of(run, long)
    assert text.startswith(long)
    said = capsys.readouterr().err
    assert "the context 32 (data.seq_length): only its last 16 tokens are used" in said
    with pytest.raises(UserError, match=r"prompt 1 has \d+ tokens and the context 32 .* --slide"):
        generate_from_run(run, long, Sampling(3))


def test_an_earlier_versions_checkpoint_takes_the_prepared_tokenizer(
    run: Path, trained: Path
) -> None:
    expected = text_of(run)
    (dataset,) = (trained.parent / "prepared").glob("*/data.json")
    as_earlier(run, dataset.parent, run.parent / "prepared")
    assert text_of(run) == expected
    without_tokenizers(run)
    with pytest.raises(UserError, match=r"step_00000002 has no tokenizer.* restore that folder"):
        text_of(run)
    assert list(Path.cwd().iterdir()) == []
    (Path.cwd() / "data").symlink_to(run.parent / "prepared")
    assert text_of(run) == expected


def test_a_checkpoint_that_training_removes_meanwhile(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = source.state.load_weights

    def pruned(path: Path, *rest: object) -> None:
        if path.name == "step_00000002":
            shutil.rmtree(path)
        load(path, *rest)

    expected = text_of(folder.step_folder(run, 1))
    monkeypatch.setattr(source.state, "load_weights", pruned)
    assert text_of(run) == expected


@pytest.mark.parametrize("ailment", ["error", "memory", "interrupt", "disk", "too large"])
def test_whatever_ails_the_sample_is_a_remark(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ailment: str,
) -> None:
    raised: dict[str, BaseException] = {
        "error": UserError("no tokenizer"),
        "memory": MemoryError(),
        "interrupt": KeyboardInterrupt(),
        "disk": OSError(28, "No space left on device"),
    }
    if ailment == "too large":
        monkeypatch.setattr(sample, "parameter_count", lambda *_sizes: 10**15)
    else:

        def fail(*_arguments: object, **_options: object) -> str:
            raise raised[ailment]

        monkeypatch.setattr(generate, "generate_from_run", fail)
    sample.sample_run(run, None, again=True)
    said = {
        "error": "no tokenizer",
        "memory": "MemoryError",
        "interrupt": "it was interrupted",
        "disk": "[Errno 28] No space left on device",
        "too large": "the whole model needs 5.2e+06 GB, and ",
    }
    shown = capsys.readouterr().out
    assert shown.startswith(f"no sample: {said[ailment]}")
    assert f"keel generate {run} --prompt TEXT" in shown
