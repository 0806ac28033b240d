"""Cutting a text does not change its tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.corpus.cuts import NoCuts, PairCuts, Pieces, WordCuts, cuts_of
from keel_megatron.data.tokenizer import Tokenizer, open_tokenizer
from tests.corpus.tokenizers import (
    bytes_bpe,
    prose,
    unigram,
    write_json,
    write_sentencepiece,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_sentencepiece(tmp_path_factory.mktemp("model")))


def encoded(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
    return [token for piece in pieces for token in tokenizer.encode(piece)]


@settings(deadline=None)
@given(st.text(alphabet=" \ncatherinsou\u2581e\u00e9\U0001f600.1", max_size=300), st.integers(1, 9))
def test_sentencepiece_tokens_stay_the_same(tokenizer: Tokenizer, text: str, limit: int) -> None:
    pieces = Pieces(cuts_of(tokenizer), limit)
    found = list(pieces.of([text[:50], text[50:]]))
    assert "".join(found) == text
    if not pieces.unsafe:
        assert encoded(tokenizer, found) == tokenizer.encode(text)


def test_prose_is_cut_near_the_limit(tokenizer: Tokenizer) -> None:
    text = prose(20_000)
    pieces = Pieces(cuts_of(tokenizer), 1000)
    found = list(pieces.of([text]))
    assert 19 <= len(found) <= 23
    assert pieces.unsafe == 0
    assert encoded(tokenizer, found) == tokenizer.encode(text)


def test_a_text_without_a_place_to_cut_is_cut_and_counted() -> None:
    pieces = Pieces(PairCuts(["xx"]), 10)
    found = list(pieces.of(["x" * 100, "x" * 65]))
    assert [len(piece) for piece in found] == [80, 80, 5]
    assert pieces.unsafe == 2


def test_a_small_text_is_one_piece() -> None:
    assert list(Pieces(NoCuts(), 10).of(["abc", "def"])) == ["abcdef"]
    assert list(Pieces(NoCuts(), 10).of([])) == []


def test_cuts_of_a_byte_level_tokenizer_are_tried(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_json(tmp_path, bytes_bpe()))
    cuts = cuts_of(tokenizer, [prose(3000, seed) for seed in range(10)])
    assert isinstance(cuts, WordCuts)
    text = prose(20_000)
    assert encoded(tokenizer, list(Pieces(cuts, 500).of([text]))) == tokenizer.encode(text)  # type: ignore[arg-type]


def test_a_tokenizer_whose_tokens_change_is_not_cut(tmp_path: Path) -> None:
    joined = open_tokenizer(write_json(tmp_path, unigram(["t s", *"abcdefghijklmnopqrstuvwxyz ."])))
    cuts = cuts_of(joined, ["a cat sat " * 50])
    assert isinstance(cuts, NoCuts)
    assert not cuts.is_proven
    assert isinstance(cuts_of(joined, proven=False), NoCuts)
