"""`keel evaluate --text` as a whole, on a run of random weights and on a trained one."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from typer.testing import CliRunner, Result

import yaml
from keel_megatron.cli.main import app
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError
from keel_megatron.evaluation.rows import Row
from keel_megatron.evaluation.scoring import Scorer
from keel_megatron.inference import source
from keel_megatron.inference.export import export_run
from keel_megatron.inference.source import opened
from keel_megatron.tracking.metrics import read_metrics
from tests.huggingface.models import write_run
from tests.integration.commands import keel
from tests.settings import settings

CODE = "def parse(self, text):\n    return [part.strip() for part in text.split(',')]\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    place = tmp_path_factory.mktemp("runs") / "keel"
    write_run(place, sentencepiece_model, model__init_std=0.1)
    return place


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    place.mkdir()
    for number in range(6):
        (place / f"{number}.py").write_text(CODE[number:] * (number + 1))
    return place


def evaluate(run: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["evaluate", str(run), *arguments])


def evaluated(run: Path, *arguments: str) -> dict[str, Any]:
    done = evaluate(run, *arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_table_json_and_lines_say_the_same(run: Path, texts: Path, tmp_path: Path) -> None:
    first, second = texts / "0.py", texts / "[1-5].py"
    paths = ("--text", str(first), "--text", str(second))
    out = tmp_path / "documents.jsonl"
    found = evaluated(run, *paths, "--out", str(out))
    assert (found["model"], found["step"]) == (str(run), 0)
    assert (found["context"], found["stride"]) == (32, 16)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["document"] for line in lines] == [f"{number}.py" for number in range(6)]
    assert [line["text"] for line in lines] == [str(first)] + [str(second)] * 5
    sums = {name: sum(line[name] for line in lines) for name in ("bytes", "tokens", "nats")}
    everything = found["total"]
    assert everything["bytes"] == sum(path.stat().st_size for path in texts.iterdir())
    assert {name: everything[name] for name in sums} == pytest.approx(sums)
    bits = sums["nats"] / math.log(2) / sums["bytes"]
    assert everything["bits_per_byte"] == pytest.approx(bits)
    assert [text["documents"] for text in found["texts"]] == [1, 5]
    assert not list(tmp_path.glob("*.partial"))
    table = evaluate(run, *paths).stdout.splitlines()
    assert len(table) == 4
    assert table[-1].split()[:4] == ["all", "6", f"{sums['bytes']:,}", f"{sums['tokens']:,}"]
    assert f"{bits:.4f}" in table[-1]
    assert table[1].split()[-1] == "-"  # one document has no standard error


def test_replicas_and_an_exported_folder_find_the_same(
    run: Path, texts: Path, tmp_path: Path
) -> None:
    export_run(run, tmp_path / "out", step=None, dtype="fp32", check=False, say=lambda _text: None)
    arguments = ("--text", str(texts), "--stride", "8", "--batch-tokens", "64")
    expected = evaluated(run, *arguments)
    folder = evaluated(tmp_path / "out", *arguments)
    assert (folder["step"], folder["total"]) == (None, expected["total"])
    done = keel(tmp_path, "evaluate", str(run), *arguments, "--processes", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"] == pytest.approx(expected["total"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --tasks NAME,... or --text PATH"),
        (("--text", "none", "--processes", "2"), "--text: none does not exist"),
        (
            ("--text", "x", "--processes", "3", "--model-processes", "2"),
            "--model-processes: 2 does not divide the 3 processes",
        ),
        (
            ("--text", "x", "--model-processes", "4"),
            "--model-processes: 4 would be 4 pipeline stages, and the model has 3 blocks",
        ),
        (("--text", "x", "--step", "7"), "--step: there is no "),
    ],
)
def test_mistakes_are_told_once(
    run: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "x").write_text(CODE)
    done = keel(tmp_path, "evaluate", str(run), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("error") == 1


@pytest.mark.parametrize("name", ["no/out.jsonl", "texts"])
def test_out_is_checked_before_the_model_is_loaded(
    run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(source, "load", lambda *_: pytest.fail("loads the model"))
    done = evaluate(run, "--text", str(texts), "--out", str(tmp_path / name))
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(f"--out: {tmp_path / name} cannot be written: ")


def test_a_disk_that_fills_up_does_not_lose_the_results(
    run: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("keel_megatron.runtime.files.write_whole", full)
    done = evaluate(run, "--text", str(texts), "--out", str(tmp_path / "out.jsonl"))
    assert "bits per byte" in done.stdout
    assert str(done.exception).endswith("out.jsonl cannot be written: No space left on device")


def text_of(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """A beginning of a text that has so many tokens."""
    for end in range(1, len(text)):
        if len(tokenizer.encode(text[:end])) == tokens:
            return text[:end]
    raise AssertionError(f"no beginning has {tokens} tokens")


def test_a_run_agrees_with_its_validation_loss(tmp_path: Path, sentencepiece_model: bytes) -> None:
    """Its two validation sequences are a document and its end, and an end and that document.

    The second is a window of `--text`. The document, twice there, is as long as the context.
    """
    context = 32
    (tmp_path / "t.model").write_bytes(sentencepiece_model)
    tokenizer = Tokenizer(tmp_path / "t.model")
    document = text_of(tokenizer, CODE * 9, context)
    held_out = json.dumps({"text": document}) + "\n"
    (tmp_path / "held_out.jsonl").write_text(2 * held_out)
    (tmp_path / "train.txt").write_text(CODE * 200)
    sections = settings(
        model__blocks=2,
        data__tokenizer="t.model",
        data__sources=[{"path": "train.txt", "validation": "held_out.jsonl"}],
        training__micro_batch_size=1,
        training__validation_sequences=2,
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    done = keel(tmp_path, "train", "run.yaml", "--processes", "1")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "test"
    records = read_metrics(run / "metrics.jsonl")
    *_, loss = (one["validation_loss"] for one in records if "validation_loss" in one)
    (tmp_path / "one.txt").write_text(document)
    found = evaluated(run, "--text", str(tmp_path / "one.txt"), "--stride", str(context))["total"]
    with opened(run) as (source, runtime):
        row = Row((*tokenizer.encode(document), tokenizer.eod), context)
        (ended,) = Scorer(source, runtime).score([row])
    assert found["tokens"] == context
    assert loss == pytest.approx((found["nats"] - ended.total) / (2 * context), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats"] / context))
