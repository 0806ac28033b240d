"""tokenizer.json of a SentencePiece model."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import sentencepiece
import tokenizers

from keel_megatron.data.tokenizer_json import NoEquivalentError, normal_pieces, to_tokenizer_json
from tests.corpus.tokenizers import prose, sentencepiece_model


def trained(**settings: Any) -> bytes:
    """A SentencePiece model."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(20_000).splitlines()),
        model_writer=content,
        minloglevel=2,
        **{"model_type": "bpe", "byte_fallback": True, "vocab_size": 330, **settings},
    )
    return content.getvalue()


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize("prefix", [True, False])
def test_the_same_tokens_and_text(prefix: bool) -> None:
    model = trained(**IDENTITY, add_dummy_prefix=prefix)
    ours = sentencepiece.SentencePieceProcessor(model_proto=model)
    theirs = tokenizers.Tokenizer.from_str(to_tokenizer_json(model))
    for text in (prose(5000), "  two  spaces ", "\u00e9\U0001f600 <unk> x", "cat\n\tcat"):
        tokens = ours.encode(text)
        theirs.encode_special_tokens = True
        assert theirs.encode(text).ids == tokens
        assert theirs.decode(tokens) == ours.decode(tokens) == text


def test_bytes_that_are_not_utf8_are_decoded_differently() -> None:
    """SentencePiece replaces the invalid byte alone, tokenizers every byte of its run."""
    model = trained(**IDENTITY, add_dummy_prefix=False)
    ours = sentencepiece.SentencePieceProcessor(model_proto=model)
    theirs = tokenizers.Tokenizer.from_str(to_tokenizer_json(model))
    tokens = [ours.piece_to_id(piece) for piece in ("<0xC5>", "<0x30>", "t")]
    assert ours.decode(tokens) == "\ufffd0t"
    assert theirs.decode(tokens) == "\ufffd\ufffdt"


def test_control_pieces_are_special_tokens() -> None:
    parsed = json.loads(to_tokenizer_json(sentencepiece_model()))
    assert [token["content"] for token in parsed["added_tokens"]] == ["<eod>", "<unk>"]
    assert all(token["special"] for token in parsed["added_tokens"])
    bare = json.loads(to_tokenizer_json(sentencepiece_model(), control=False))
    assert bare["added_tokens"] == []
    assert len(bare["model"]["vocab"]) == 400


def test_pieces_of_text() -> None:
    pieces = normal_pieces(sentencepiece_model())
    assert len(pieces) == 400 - 256 - 2
    assert " the" in pieces
    assert not {"<eod>", "<unk>", "<0x41>"} & set(pieces)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 300, **IDENTITY}, "it is not BPE"),
        ({"byte_fallback": False, "vocab_size": 80, **IDENTITY}, "it has no byte fallback"),
        ({"remove_extra_whitespaces": False}, "it normalises characters"),
        ({"normalization_rule_name": "identity"}, "it removes white space"),
        ({"user_defined_symbols": ["<x>"], **IDENTITY}, "it has user-defined pieces"),
        ({"treat_whitespace_as_suffix": True, **IDENTITY}, "marks spaces at the end"),
    ],
)
def test_models_without_an_equivalent(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoEquivalentError, match=reason):
        to_tokenizer_json(trained(**settings))


def test_pieces_of_a_model_that_changes_the_text() -> None:
    with pytest.raises(NoEquivalentError, match="adds a space before a text"):
        normal_pieces(trained(**IDENTITY))


@pytest.mark.parametrize("content", [b"\x0a\xff", b"\x0b\x00", b"\xff" * 9, b"\x0a\x02\x0a\x09"])
def test_damaged_models(content: bytes) -> None:
    with pytest.raises(NoEquivalentError):
        to_tokenizer_json(content)
