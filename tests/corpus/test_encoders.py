"""Fast encoders are used only if their tokens equal the tokenizer's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.corpus import encoders
from keel_megatron.corpus.encoders import NASTY, UnusableError, choose, encoder, open_encoder
from keel_megatron.data.tokenizer import Tokenizer, open_tokenizer
from tests.corpus.tokenizers import (
    SPECIAL,
    bytes_bpe,
    prose,
    unigram,
    write_json,
    write_sentencepiece,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json(tmp_path_factory.mktemp("json"), bytes_bpe())


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
def test_every_encoder_of_a_sentencepiece_model_equals_it(model: Path, name: str) -> None:
    tokenizer, encode = open_encoder(model, name)
    for text in (*NASTY, prose(30_000)):
        assert encode(text).tolist() == tokenizer.encode(text)


@settings(deadline=None)
@given(st.text())
def test_the_fastest_equals_the_model_on_any_text(model: Path, text: str) -> None:
    tokenizer, encode = open_encoder(model, "gigatoken")
    assert encode(text).tolist() == tokenizer.encode(text)


def test_the_fastest_equal_one_is_chosen(model: Path) -> None:
    choice = choose(Tokenizer(model), [prose(5000)], print)
    assert choice.name == "gigatoken"
    assert "equal to sentencepiece on a sample of " in choice.description


def test_a_different_encoder_is_not_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = encoders.encoder

    def wrong(tokenizer: Tokenizer, name: str) -> encoders.Encode:
        encode = real(tokenizer, name)
        if name != "gigatoken":
            return encode
        return lambda text: encode(text.replace("birds", "bird"))

    monkeypatch.setattr(encoders, "encoder", wrong)
    said: list[str] = []
    choice = choose(Tokenizer(model), ["some birds"], said.append)
    assert choice.name == "tokenizers"
    assert said == ["gigatoken is not used: its tokens differ, first in 'some birds'"]


def test_missing_packages_leave_sentencepiece(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gigatoken", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    said: list[str] = []
    choice = choose(Tokenizer(model), ["text"], said.append)
    assert choice.name == "sentencepiece"
    assert choice.description.startswith("sentencepiece ")
    assert len(said) == 2
    assert "pip install 'keel-megatron[data]'" in said[0]


def test_special_tokens_in_text_stay_text(byte_level: Path) -> None:
    text = f"a{SPECIAL[0]}b</s><pad> {SPECIAL[0]}{SPECIAL[0]}"
    for name in ("gigatoken", "tokenizers"):
        tokenizer, encode = open_encoder(byte_level, name)
        tokens = encode(text).tolist()
        assert tokens == tokenizer.encode(text)
        assert not {0, 1, 2} & set(tokens)
        assert tokenizer.decode(tokens) == text


def test_special_tokens_that_the_model_finds_by_itself_stay_text(tmp_path: Path) -> None:
    path = write_json(tmp_path, unigram(list("ab</s>")))
    tokenizer, encode = open_encoder(path, "tokenizers")
    tokens = encode("a</s>b</s>").tolist()
    assert tokens == tokenizer.encode("a</s>b</s>")
    assert tokenizer.eod == 1 not in tokens
    assert tokenizer.decode(tokens) == "a</s>b</s>"


def test_an_unsupported_tokenizer_falls_back(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_json(tmp_path, unigram(list("ab</s>"))))
    said: list[str] = []
    assert choose(tokenizer, ["abab"], said.append).name == "tokenizers"
    assert said[0].startswith("gigatoken is not used: ")


def test_a_model_without_byte_fallback_has_no_fast_encoder(tmp_path: Path) -> None:
    import io

    import sentencepiece

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(20_000).splitlines()),
        model_writer=content,
        model_type="bpe",
        vocab_size=80,
        minloglevel=2,
    )
    path = tmp_path / "plain.model"
    path.write_bytes(content.getvalue())
    with pytest.raises(UnusableError, match=r"of plain.model, it has no byte fallback"):
        encoder(Tokenizer(path), "gigatoken")
    assert choose(Tokenizer(path), [], lambda _text: None).name == "sentencepiece"
