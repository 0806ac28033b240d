"""Tokens of conversations."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from keel_megatron.data.chat.templates import DEFAULT
from keel_megatron.data.chat.tokens import ChatTokenizer
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError
from tests.corpus.tokenizers import bytes_bpe, write_json, write_sentencepiece
from tests.data.chat.samples import (
    AGAIN,
    ANSWER,
    CHATML,
    MARKED,
    QUESTION,
    SYSTEM,
    YES,
    with_chatml,
)

MESSAGES = [SYSTEM, QUESTION, ANSWER, AGAIN, YES]


def test_answers_are_encoded_apart_and_count(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_sentencepiece(tmp_path))
    with ChatTokenizer(tokenizer, DEFAULT, "the default") as chat:
        tokens, counts = chat.encode(MESSAGES)
        prompts = [chat.prompt(MESSAGES[:2]), chat.prompt(MESSAGES[:4])]
        assert chat.ends() == [tokenizer.eod]
    eod = tokenizer.eod
    answers = [[*tokenizer.encode(m["content"]), eod] for m in (ANSWER, YES)]
    first = tokenizer.encode("<|system|>\nCount.\n<|user|>\nHow many cats?\n<|assistant|>\n")
    second = tokenizer.encode("\n<|user|>\n  Sure?  \n<|assistant|>\n")
    assert tokens.tolist() == [*first, *answers[0], *second, *answers[1]]
    assert tokens[counts].tolist() == answers[0] + answers[1]
    assert prompts == [first, [*first, *answers[0], *second]]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
def test_special_tokens_of_a_hugging_face_tokenizer(tmp_path: Path, template: str) -> None:
    tokenizer = HuggingFaceTokenizer(write_json(tmp_path, with_chatml(bytes_bpe())))
    start, end = (tokenizer.special_names[name] for name in ("<|im_start|>", "<|im_end|>"))
    with ChatTokenizer(tokenizer, template, "it") as chat:
        tokens, counts = chat.encode([QUESTION, YES])
        assert chat.ends() == [tokenizer.eod, end]
    line = tokenizer.encode("\n")
    question = [start, *tokenizer.encode("user\nHow many cats?"), end, *line]
    before = [*question, start, *tokenizer.encode("assistant\n")]
    answer = [*tokenizer.encode("Yes"), end]
    assert tokens.tolist() == [*before, *answer, *line, tokenizer.eod]
    assert tokens[counts].tolist() == answer + line * (template == CHATML)
    assert not tokenizer.special & set(tokenizer.encode("<|im_end|>"))  # as before in a text


def test_a_message_with_the_name_of_a_special_token_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_sentencepiece(tmp_path))
    bad = {"role": "assistant", "content": "a<eod>\n<|user|>"}
    with (
        ChatTokenizer(tokenizer, DEFAULT, "the default") as chat,
        pytest.raises(ValueError, match="message 2 contains '<eod>', the name of a special token"),
    ):
        chat.encode([QUESTION, bad])


def test_the_first_token_does_not_count(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_sentencepiece(tmp_path))
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    with ChatTokenizer(tokenizer, template, "it") as chat:
        tokens, counts = chat.encode([{"role": "assistant", "content": "zzz"}])
        assert tokens[-1] == tokenizer.eod
        assert counts.tolist() == [False, *[True] * (len(tokens) - 2), False]
        with pytest.raises(ValueError, match="only the first token is the assistant's"):
            chat.encode([{"role": "assistant", "content": "z"}])


def test_a_tokenizer_that_adds_spaces_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b ab ba abc"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="cannot encode conversations: 'a' and 'b' are decoded as"):
        ChatTokenizer(Tokenizer(tmp_path / "tokenizer.model"), DEFAULT, "the default")
