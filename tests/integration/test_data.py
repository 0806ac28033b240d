"""Whole runs on datasets: blends, resumes, slow preparation, runs of earlier versions."""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import yaml
from keel_megatron.data.tokenizer_json import to_tokenizer_json
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.training import dataset as training_dataset
from tests.datasets import VOCABULARY, made_up, tokenizer_model, write_tokens
from tests.distributed import run_ranks
from tests.earlier import as_earlier
from tests.integration.commands import keel, losses_of, start, write_config
from tests.settings import settings

STEPS = 12


def blend_config(folder: Path, **overrides: Any) -> Path:
    """A 70/30 blend of JSON lines and a ready Megatron dataset."""
    words = Path(ast.__file__).read_text().split("\n\n")
    lines = [json.dumps({"content": text}) for text in words if text.strip()]
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer.json").write_text(to_tokenizer_json(tokenizer_model()))
    write_tokens(folder / "ready" / "tokens", made_up(60, 0))
    sources = [
        {"name": "lines", "path": "lines.jsonl", "text_key": "content", "weight": 0.7},
        {"name": "ready", "path": "ready/tokens", "weight": 0.3},
    ]
    sections = settings(
        **{
            "data__sources": sources,
            "data__tokenizer": "tokenizer.json",
            "data__vocab_size": VOCABULARY,
            "data__validation_fraction": 0.2,
            "training__steps": STEPS,
            "training__validation_sequences": 4,
            "training__global_batch_size": 4,
            "training__micro_batch_size": 1,
            "model__blocks": 2,
            "checkpoint__every": 4,
            "checkpoint__async_save": False,
            **overrides,
        }
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def trained_on(path: Path, fault: int | None) -> list[tuple[int, str]]:
    """Train as a rank; (step, hash of the tokens) of every micro-batch that this rank reads.

    Args:
        path: the YAML file.
        fault: the rank dies before this step.
    """
    from keel_megatron.data.batches import BatchSource
    from keel_megatron.training.run import run_training

    seen: list[tuple[int, str]] = []
    whole = BatchSource.micro_batches

    def micro_batches(self: BatchSource, consumed: int, size: int) -> Any:
        for number in range(consumed, consumed + size):
            tokens = self.samples.read(number).tokens
            assert tokens is not None
            seen.append((number, hashlib.sha256(tokens.tobytes()).hexdigest()))
        return whole(self, consumed, size)

    def before_step(position: Any, _engine: Any) -> None:
        if position.step == fault:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchSource, "micro_batches", micro_batches)
        patch.chdir(path.parent)
        try:
            run_training(path, before_step=before_step)
        except KeyboardInterrupt:
            return seen
    return seen


def test_a_blend_is_resumed_at_another_layout_with_the_same_samples(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "killed").mkdir()
    (straight,) = run_ranks(1, trained_on, blend_config(tmp_path / "straight"), None)
    path = blend_config(tmp_path / "killed", parallel__pipeline=2)
    before = run_ranks(2, trained_on, path, 6)
    blend_config(tmp_path / "killed", parallel__tensor=2, training__micro_batch_size=2)
    after = run_ranks(2, trained_on, path, None)
    expected = dict(straight)
    assert list(expected) == list(range(4 * STEPS))
    assert len(set(expected.values())) > len(expected) // 2
    for rank in (*before, *after):
        assert rank
        assert rank == [(number, expected[number]) for number, _digest in rank]
    assert after[0][0][0] == 16  # from the checkpoint of step 4
    runs = [tmp_path / name / "runs" / "test" for name in ("straight", "killed")]
    (one, other) = (losses_of(run / "metrics.jsonl") for run in runs)
    for (step, loss, norm), found in zip(one, other, strict=True):
        assert found == (step, pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
    log = (runs[1] / "log.txt").read_text()
    assert "shares of the samples: lines 70.0%, ready 30.0%" in log
    assert "samples so far: lines " in log
    last = [r for r in read_metrics(runs[0] / "metrics.jsonl") if "validation_loss" in r][-1]
    both = (last["validation/lines/loss"], last["validation/ready/loss"])
    assert last["validation_loss"] == pytest.approx(0.7 * both[0] + 0.3 * both[1])


def test_other_weights_are_another_run(tmp_path: Path) -> None:
    path = blend_config(tmp_path, training__steps=1)
    assert keel(tmp_path, "train", str(path)).returncode == 0
    sources = yaml.safe_load(path.read_text())["data"]["sources"]
    sources[0]["weight"] = 0.5
    refused = keel(
        tmp_path, "train", str(path), "training.steps=2", f"data.sources={json.dumps(sources)}"
    )
    assert refused.returncode == 2
    assert "data.sources: the weights are not those of the run: " in refused.stderr
    assert "lines 700, ready 300 then, and lines 625, ready 375 now" in refused.stderr
    # The dataset may move, with or without a configuration that can build it.
    (built,) = (p.parent for p in (tmp_path / "data").glob("*/data.json"))
    shutil.move(built, tmp_path / "elsewhere")
    shutil.move(tmp_path / "ready", tmp_path / "moved")
    (tmp_path / "lines.jsonl").unlink()
    sources[0] = {"name": "lines", "weight": 0.7}
    sources[1]["path"] = "moved"
    moved = (f"data.sources={json.dumps(sources)}", "data.dataset=elsewhere")
    done = keel(tmp_path, "train", str(path), "training.steps=2", *moved)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "test"
    assert [step for step, *_ in losses_of(run / "metrics.jsonl")] == [1, 2]
    # The tokenizer is in the run and its checkpoints.
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "tokenizer.json").unlink()
    for source in (run, run / "checkpoints" / "step_00000002"):
        arguments = ("--prompt", "abc", "--max-new-tokens", "3", "--temperature", "0")
        generated = keel(tmp_path, "generate", str(source), *arguments)
        assert generated.stdout.startswith("abc"), generated.stderr
        assert (source / "tokenizer.json").is_file()


@pytest.mark.parametrize("launcher", ["keel", "another"])
def test_preparation_may_take_longer_than_a_collective(tmp_path: Path, launcher: str) -> None:
    """A lock that another process holds makes it slow."""
    text = tmp_path / "text.py"
    text.write_text(Path(argparse.__file__).read_text())
    write_config(tmp_path, text, parallel__timeout_seconds=3.0, training__validation_sequences=4)
    short = ("training.steps=1", "model.blocks=2")
    assert keel(tmp_path, "data", "build", "run.yaml").returncode == 0
    (folder,) = (p.parent for p in (tmp_path / "data").glob("*/data.json"))
    shutil.move(folder, tmp_path / "kept")
    with (tmp_path / "data" / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if launcher == "keel":
            with start(tmp_path, "train", "run.yaml", *short, "--processes", "2") as process:
                assert process.stdout is not None
                while "waiting for another process" not in process.stdout.readline():
                    assert process.poll() is None
                _release_later(lock, tmp_path / "kept", folder)
                _shown, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
        else:
            import threading

            later = threading.Thread(target=_release_later, args=(lock, tmp_path / "kept", folder))
            later.start()
            codes = run_ranks(2, as_ranks, tmp_path, list(short))
            later.join()
            assert codes == [0, 0]
    assert len(losses_of(tmp_path / "runs" / "test" / "metrics.jsonl")) == 1


def _release_later(lock: Any, kept: Path, folder: Path) -> None:
    """The other process has built the dataset, after more than parallel.timeout_seconds."""
    time.sleep(5)
    shutil.move(kept, folder)
    fcntl.flock(lock, fcntl.LOCK_UN)


def as_ranks(folder: Path, overrides: list[str]) -> int:
    """Train as a rank of another launcher."""
    from keel_megatron.training.run import run_training

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv(training_dataset.DATASET, raising=False)
        return run_training(folder / "run.yaml", tuple(overrides)).exit_code


def test_a_run_of_an_earlier_version_is_resumed_exactly(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text(Path(argparse.__file__).read_text())
    write_config(tmp_path, text, model__blocks=2, checkpoint__every=3)
    quick = ("training.validation_sequences=16",)
    assert keel(tmp_path, "train", "run.yaml", *quick).returncode == 0
    run = tmp_path / "runs" / "test"
    expected = losses_of(run / "metrics.jsonl")
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (dataset,) = (p.parent for p in (tmp_path / "data").glob("*/data.json"))
    prepared = as_earlier(run, dataset, tmp_path / "data")
    shutil.rmtree(dataset)
    text.unlink()
    text.write_text("other")
    resumed = keel(tmp_path, "train", "run.yaml", *quick)
    assert resumed.returncode == 0, resumed.stderr
    said = f"using {prepared.relative_to(tmp_path)}, with which an earlier version started this run"
    assert said in resumed.stdout
    assert losses_of(run / "metrics.jsonl") == expected
    shutil.rmtree(prepared)
    missing = keel(tmp_path, "train", "run.yaml", *quick, "training.steps=7")
    assert missing.returncode == 2
    assert "an earlier version started this run with data/2222222222222222, which does not" in (
        missing.stderr
    )
