"""Tokenizers in Hugging Face's format."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.data.huggingface import EOD_KEY, HuggingFaceTokenizer
from keel_megatron.data.tokenizer import Tokenizer, open_tokenizer
from keel_megatron.errors import UserError
from tests.corpus.tokenizers import (
    SPECIAL,
    bytes_bpe,
    prose,
    unigram,
    write_json,
    write_sentencepiece,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(write_json(tmp_path_factory.mktemp("json"), bytes_bpe()))


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer: HuggingFaceTokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.special.isdisjoint(tokens)
    assert tokenizer.lost(text) == 0


def test_its_properties(tokenizer: HuggingFaceTokenizer) -> None:
    assert tokenizer.vocab_size == 326
    assert tokenizer.eod == 0
    assert tokenizer.special == {0, 1, 2}
    assert tokenizer.losses() == []
    assert len(tokenizer.encode(prose(1000))) < 500


def test_special_tokens_in_a_text_are_text(tokenizer: HuggingFaceTokenizer) -> None:
    text = "".join(SPECIAL) + "a <pad>"
    tokens = tokenizer.encode(text)
    assert tokenizer.special.isdisjoint(tokens)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([tokenizer.eod, *tokens, tokenizer.eod]) == text


def test_special_tokens_that_a_model_finds_by_itself_are_text(tmp_path: Path) -> None:
    found = open_tokenizer(write_json(tmp_path, unigram(list("ab</s>"))))
    assert found.eod == 1
    assert found.decode(found.encode("a</s>b</s>")) == "a</s>b</s>"
    assert 1 not in found.encode("a</s>b</s>")


@pytest.mark.parametrize("value", ["</s>", {"content": "</s>"}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_end_of_text_is_the_configured_one(tmp_path: Path, name: str, value: Any) -> None:
    write_json(tmp_path, bytes_bpe())
    (tmp_path / name).write_text(json.dumps({"eos_token": value}))
    found = open_tokenizer(tmp_path)
    assert found.eod == 2
    # A copy of the one file has the same.
    copy = tmp_path / "copy.json"
    copy.write_bytes(found.file_content())
    assert json.loads(copy.read_text())[EOD_KEY] == "</s>"
    (tmp_path / name).unlink()
    again = open_tokenizer(copy)
    assert again.eod == 2
    assert again.file_content() == copy.read_bytes()


def test_a_file_of_its_own_is_kept_byte_for_byte(tokenizer: HuggingFaceTokenizer) -> None:
    assert tokenizer.file_content() == tokenizer.path.read_bytes()


def test_no_end_of_text(tmp_path: Path) -> None:
    content = unigram(list("ab"))
    content["model"]["vocab"][1][0] = content["added_tokens"][0]["content"] = "[SEP]"
    path = write_json(tmp_path, content)
    with pytest.raises(UserError, match=r"has no end-of-text token.*eos_token in tokenizer_config"):
        open_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[SEP]"}')
    assert open_tokenizer(path).eod == 1


def test_unknown_characters_are_lost(tmp_path: Path) -> None:
    found = open_tokenizer(write_json(tmp_path, unigram(list("ab"))))
    assert found.lost("abcab") == 1
    assert found.losses()


def test_truncation_padding_and_dropout_are_off(tmp_path: Path) -> None:
    content = bytes_bpe()
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["model"]["dropout"] = 0.9
    found = open_tokenizer(write_json(tmp_path, content))
    text = prose(500)
    assert found.encode(text) == found.encode(text)
    assert found.decode(found.encode(text)) == text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 3}', "[" * 100_000])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot be read as a Hugging Face tokenizer.json"):
        open_tokenizer(tmp_path / "tokenizer.json")


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path, bytes_bpe())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'keel-megatron\[data\]'"):
        open_tokenizer(path)


def test_folders_and_kinds_of_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no tokenizer.json or tokenizer.model in"):
        open_tokenizer(tmp_path)
    model = write_sentencepiece(tmp_path)
    assert isinstance(open_tokenizer(tmp_path), Tokenizer)
    assert isinstance(open_tokenizer(model), Tokenizer)
    write_json(tmp_path, bytes_bpe())
    assert isinstance(open_tokenizer(tmp_path), HuggingFaceTokenizer)
