"""Exported tokenizers encode as the run's own."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from keel_megatron.data.huggingface import EOD_KEY
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.huggingface import tokenizer as module
from keel_megatron.huggingface.tokenizer import CONFIG, DIFFICULT, proven_files, tokenizer_files


def test_a_sentencepiece_model_becomes_an_equal_tokenizer_json(
    sentencepiece_model: bytes, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    own = open_tokenizer(tmp_path / "tokenizer.model")
    files = tokenizer_files(own, 32)
    assert files.remarks == ()
    assert files.content["tokenizer.model"] == sentencepiece_model
    assert proven_files(own, 32, DIFFICULT) == files
    assert json.loads(files.content[CONFIG])["eos_token"] == "<eod>"


def test_a_tokenizer_json_that_differs_is_not_written(
    sentencepiece_model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    own = open_tokenizer(tmp_path / "tokenizer.model")
    right = module.to_tokenizer_json

    def wrong(model: bytes) -> str:
        content = json.loads(right(model))
        content["model"]["merges"] = content["model"]["merges"][::-1]
        return json.dumps(content)

    monkeypatch.setattr(module, "to_tokenizer_json", wrong)
    files = proven_files(own, 32, ["def format_usage(self): return parser.format_help()"])
    assert files.content.keys() == {"tokenizer.model"}
    assert "WARNING: tokenizer.json is not written" in files.remarks[0]
    assert "would encode 'def format_usage" in files.remarks[0]
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    files = proven_files(own, 32, DIFFICULT)
    assert "the package tokenizers is missing" in files.remarks[0]
    assert "tokenizer.json" in files.content


def test_a_model_without_an_equivalent_is_kept_and_said(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and the dog ran"] * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    files = proven_files(open_tokenizer(tmp_path / "tokenizer.model"), 32, DIFFICULT)
    assert files.content.keys() == {"tokenizer.model"}
    assert "tokenizer.json is not written" in files.remarks[0]
    assert "it is not BPE" in files.remarks[0]


def test_a_tokenizer_json_is_copied_without_tokens_that_training_did_not_see(
    tmp_path: Path,
) -> None:
    names = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abc "]
    vocabulary = {name: number for number, name in enumerate(names)}
    given = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    given.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    given.add_special_tokens(["<s>", "</s>"])
    given.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    given.save(str(tmp_path / "tokenizer.json"))
    own = open_tokenizer(tmp_path)
    files = proven_files(own, 32, DIFFICULT)
    assert "post_processor" in files.remarks[0]
    assert json.loads(files.content[CONFIG])["eos_token"] == "</s>"


def test_a_copy_has_no_key_of_ours_and_names_the_end_of_a_unigram_document(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("<end>", 0.0), *((piece, -1.0) for piece in "abc ")]
    content = json.loads(tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0)).to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**content, EOD_KEY: "<end>"}))
    own = open_tokenizer(path)
    files = tokenizer_files(own, 32)
    assert own.eod == 1
    assert json.loads(files.content["tokenizer.json"]) == content
    assert json.loads(files.content[CONFIG])["eos_token"] == "<end>"
    path.write_text(json.dumps({**content, "foreign": 1}))
    with pytest.raises(UserError, match=r"cannot be read as a Hugging Face tokenizer\.json"):
        open_tokenizer(path)
