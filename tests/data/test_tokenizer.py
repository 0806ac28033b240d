"""Any text survives the tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.config import UserError
from keel_megatron.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(train_tokenizer([file.read_text() for file in sorted(text.iterdir())], 512))
    return Tokenizer(path)


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eod not in tokens


@pytest.mark.parametrize(
    "sample",
    [
        "\tdef f():\r\n\n  ",
        "<eod></s><unk><0x41>",
        "\u2581a\u2581 \u2581",
        "\U0001f600 café",
        "\x00",
    ],
)
def test_difficult_text_comes_back(tokenizer: Tokenizer, sample: str) -> None:
    assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_training_is_repeatable_and_useful(text: Path, tokenizer: Tokenizer) -> None:
    sources = [path.read_text() for path in sorted(text.iterdir())]
    assert train_tokenizer(sources, 512) == train_tokenizer(sources, 512)
    assert len(tokenizer.encode(sources[0])) < 0.5 * len(sources[0])


def test_chunks_of_a_text_train_the_same(text: Path) -> None:
    sources = [path.read_text() for path in sorted(text.iterdir())]
    chunks = [[source[at : at + 999] for at in range(0, len(source), 999)] for source in sources]
    assert train_tokenizer(chunks, 512) == train_tokenizer(sources, 512)


@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt(), UserError("a bad file")])
def test_what_ends_the_text_is_raised_as_it_is(error: BaseException) -> None:
    def documents() -> Iterator[str]:
        yield "hello world"
        raise error

    with pytest.raises(type(error)) as raised:
        train_tokenizer(documents(), 300)
    assert raised.value is error


def test_too_little_text_for_the_vocabulary() -> None:
    with pytest.raises(UserError, match=r"data.vocab_size: 2048 is too large .* at most \d+"):
        train_tokenizer(["hello world"], 2048)


def test_the_largest_vocabulary_that_is_named_works() -> None:
    sources = ["hello world, a few words here\n" * 10]
    with pytest.raises(UserError) as caught:
        train_tokenizer(sources, 2048)
    found = re.search(r"must be at most (\d+)", str(caught.value))
    assert found is not None
    train_tokenizer(sources, int(found[1]))
    with pytest.raises(UserError, match=f"must be at most {found[1]}"):
        train_tokenizer(sources, int(found[1]) + 1)


def test_a_vocabulary_smaller_than_the_characters() -> None:
    sources = ["".join(map(chr, range(0x4E00, 0x6000)))]
    with pytest.raises(
        UserError, match=r"data.vocab_size: 320 is too small .* must be at least 4866"
    ):
        train_tokenizer(sources, 320)
    train_tokenizer(sources, 4866)


def test_no_text_to_train_on() -> None:
    with pytest.raises(UserError, match=r"data: the training set is too small"):
        train_tokenizer([""], 512)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "not.model"
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as a SentencePiece model"):
        Tokenizer(path)
