"""Perplexity of texts: every byte is paid for, each token in the context that it should have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError
from keel_megatron.evaluation import scoring
from keel_megatron.evaluation import text as text_module
from keel_megatron.evaluation.perplexity import DocumentScore
from keel_megatron.evaluation.text import Texts, evaluate_texts, windows
from keel_megatron.inference.source import Source, opened
from keel_megatron.runtime.distributed import Runtime
from tests.huggingface.models import write_run

CONTEXT = 32
LONG = "def parse(self, text):\n    return [part.strip() for part in text.split(',')]\n" * 5
SHORT = "naïve café ✓"


@pytest.fixture(scope="module", autouse=True)
def _no_progress() -> Iterator[None]:
    """On a slow machine there would be lines of progress among the messages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "SECONDS_BETWEEN_LINES", math.inf)
        patch.setattr(scoring, "SECONDS_BETWEEN_LINES", math.inf)
        yield


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes
) -> Iterator[tuple[Source, Runtime]]:
    run = tmp_path_factory.mktemp("runs") / "keel"
    write_run(run, sentencepiece_model, model__init_std=0.1)
    with opened(run) as pair:
        yield pair


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Plain text and JSON lines with short, long, blank and damaged documents."""
    place = tmp_path / "texts"
    place.mkdir()
    (place / "a.txt").write_text("\ufeff" + LONG)
    rows = [{"text": "x = 1"}, {"text": " \n"}, {"text": SHORT}, {"other": 1}, {"text": LONG[7:]}]
    (place / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def run(
    model: tuple[Source, Runtime], *paths: Path, stride: int | None = None, **options: Any
) -> tuple[list[tuple[Path, DocumentScore]], list[str]]:
    """The documents in order, and what is said."""
    found: list[tuple[Path, DocumentScore]] = []
    said: list[str] = []
    wanted = Texts(paths, "text", stride, options.pop("batch_tokens", 100))
    evaluate_texts(*model, wanted, said.append, lambda *one: found.append(one))
    return found, said


@torch.inference_mode()
def expected_nats(source: Source, text: str, stride: int) -> float:
    """Each token given the tokens before it in its window, one at a time."""
    tokens = [source.tokenizer.eod, *source.tokenizer.encode(text)]
    nats, last = 0.0, len(tokens) - 1
    for position in range(1, last + 1):
        begin = 0
        if position > CONTEXT:
            moves = -(-(position - CONTEXT) // stride)
            begin = min(CONTEXT + moves * stride, last) - CONTEXT
        seen = torch.tensor([tokens[begin:position]])
        assert seen.shape[1] <= CONTEXT
        logits = source.model(seen, torch.arange(seen.shape[1])[None], None)[0, -1].double()
        nats -= float(logits[tokens[position]] - logits.logsumexp(-1))
    return nats


@pytest.mark.parametrize("stride", [None, 1, 5, CONTEXT])
def test_documents_cost_what_their_tokens_do_one_by_one(
    model: tuple[Source, Runtime], texts: Path, stride: int | None
) -> None:
    found, said = run(model, texts, stride=stride)
    contents = {"a.txt": LONG, "b.jsonl@0": "x = 1", "b.jsonl@31": SHORT, "b.jsonl@97": LONG[7:]}
    assert len(found) == len(contents)
    for (path, one), text in zip(found, contents.values(), strict=True):
        assert path == texts
        assert one.bytes == len(text.encode())
        assert one.tokens == len(model[0].tokenizer.encode(text))
        assert one.nats == pytest.approx(expected_nats(model[0], text, stride or 16), rel=1e-5)
        assert one.lost == 0
    assert [one.name.split("@")[0] for _path, one in found] == ["a.txt"] + ["b.jsonl"] * 3
    (line,) = said
    assert line.startswith("--text: 1 damaged record left out; the first: ")
    assert line.partition("b.jsonl, ")[2].startswith("line 4: has no key 'text' (its keys: ")


def test_a_file_is_counted_at_the_first_path_that_reaches_it(
    model: tuple[Source, Runtime], texts: Path
) -> None:
    found, _said = run(model, texts / "a.txt", texts)
    assert [path for path, _one in found] == [texts / "a.txt"] + [texts] * 3


def test_batches_and_portions_change_nothing(model: tuple[Source, Runtime], texts: Path) -> None:
    found, _said = run(model, texts, batch_tokens=1)
    for (_p, one), (_q, other) in zip(found, run(model, texts)[0], strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-6)
        assert replace(one, nats=0.0) == replace(other, nats=0.0)


class NoAccents(Tokenizer):
    """Loses accents, and has nothing for a check mark."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.replace("ï", "i").replace("✓", ""))


def test_what_the_tokenizer_loses_is_said(model: tuple[Source, Runtime], texts: Path) -> None:
    source = replace(model[0], tokenizer=NoAccents(model[0].tokenizer.path))
    (texts / "c.txt").write_text("✓✓")  # no token at all
    found, said = run((source, model[1]), texts)
    assert [one.lost for _path, one in found] == [0, 0, 2, 0, 2]
    assert (found[-1][1].tokens, found[-1][1].nats, found[-1][1].bytes) == (0, 0.0, 6)
    assert said[-1].startswith("--text: the tokenizer loses characters of 2 of 5 documents: ")


@pytest.mark.parametrize("stride", [0, 33])
def test_a_stride_that_leaves_tokens_out_is_refused(
    model: tuple[Source, Runtime], texts: Path, stride: int
) -> None:
    with pytest.raises(UserError, match=rf"--stride: {stride} must be from 1 to the context, 32"):
        run(model, texts, stride=stride)


def test_texts_that_cannot_be_read(model: tuple[Source, Runtime], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--text: \S+none does not exist"):
        run(model, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--text: there is no text in"):
        run(model, tmp_path / "empty")
    (tmp_path / "bad.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match=r"--text: there is no document in \S+bad\.jsonl"):
        run(model, tmp_path / "bad.jsonl")
    for end in ("bin", "idx"):
        (tmp_path / f"tokens.{end}").write_bytes(b"MMIDIDX\x00\x00" * 9)
    with pytest.raises(UserError, match=r"--text: .* which are tokens; give the text"):
        run(model, tmp_path / "tokens.bin")


PIECES = st.lists(st.lists(st.integers(1, 9), max_size=40), max_size=5)


@given(pieces=PIECES, context=st.integers(1, 12), data=st.data())
def test_windows_score_each_token_once_in_its_context(
    pieces: list[list[int]], context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    tokens = [0, *(token for piece in pieces for token in piece)]
    position = 1
    for row in windows(pieces, 0, context, stride):
        assert 1 <= row.scored < len(row.tokens) <= context + 1
        end = position + row.scored
        assert list(row.tokens) == tokens[end - len(row.tokens) : end]
        before = len(row.tokens) - row.scored
        assert before >= min(position, context - stride + 1)
        position = end
    assert position == len(tokens)


def test_progress_is_said(
    model: tuple[Source, Runtime], texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(text_module, "SECONDS_BETWEEN_LINES", 5.0)
    monkeypatch.setattr(text_module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    _found, said = run(model, texts, batch_tokens=1)
    tokens = len(model[0].tokenizer.encode(LONG))
    assert said[0] == f"so far: 0 documents, {tokens} tokens, {tokens / 10:.0f} tokens/s"
