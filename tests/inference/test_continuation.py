"""The text of a continuation: whole characters, and nothing of a stop text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel_megatron.data.tokenizer import Tokenizer, train_tokenizer
from keel_megatron.inference.continuation import Continuation


class Bytes:
    """A tokenizer of bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def pieces(text: str, stop: tuple[str, ...] = (), prompt: str = "x") -> tuple[list[str], bool]:
    """What is said token by token, and whether a stop text was met."""
    continuation = Continuation(Bytes(), list(prompt.encode()), stop)
    said = []
    for byte in text.encode():
        said.append(continuation.add(byte))
        if continuation.stopped:
            break
    said.append(continuation.finish())
    assert "".join(said) == continuation.text
    return said, continuation.stopped


def test_a_character_is_said_whole() -> None:
    assert pieces("aé€b")[0] == ["a", "", "é", "", "", "€", "b", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one. two", (". ",), "one", True),
        ("aab", ("ab",), "a", True),
        ("abcx", ("abcd", "x"), "abc", True),
        ("abab", ("abc",), "abab", False),
        ("end\n", ("\n\n",), "end\n", False),
        ("a€b", ("€",), "a", True),
    ],
)
def test_a_stop_text_is_left_out(
    text: str, stop: tuple[str, ...], expected: str, stopped: bool
) -> None:
    said, found = pieces(text, stop)
    assert ("".join(said), found) == (expected, stopped)


def test_what_might_be_a_stop_text_is_held_back() -> None:
    assert pieces("a..b", ("...",))[0] == ["a", "", "", "..b", ""]


@given(st.text(max_size=30), st.text(max_size=10))
def test_nothing_is_lost(text: str, prompt: str) -> None:
    assert "".join(pieces(text, prompt=prompt)[0]) == text


def test_spaces_of_pieces_are_kept(tmp_path: Path) -> None:
    text = "the cat sat on the mat and the dog sat on the log\n" * 50
    (tmp_path / "m.model").write_bytes(train_tokenizer([text], 300))
    tokenizer = Tokenizer(tmp_path / "m.model")
    for prompt in ([tokenizer.eod], tokenizer.encode("a mat")):
        continuation = Continuation(tokenizer, prompt)
        said = [continuation.add(token) for token in tokenizer.encode(" the log é sat")]
        assert "".join([*said, continuation.finish()]) == " the log é sat"
