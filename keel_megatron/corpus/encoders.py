"""What encodes text when a dataset is built: the fastest that equals the tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from keel_megatron.config.reading import LARGE, read_small
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import SPACE_MARK, Tokenizer, open_tokenizer
from keel_megatron.data.tokenizer_json import NoEquivalentError, to_tokenizer_json

Tokens = NDArray[Any]
Encode = Callable[[str], Tokens]

NASTY: Final = (
    "<eod></s><unk><s><pad><0x41><|endoftext|> <eos>",
    f"{SPACE_MARK}a{SPACE_MARK} {SPACE_MARK}{SPACE_MARK}b {SPACE_MARK}",
    " " * 3000 + "x" + " " * 7 + "\n" * 40 + "\t" * 33 + " \t \r\n \u00a0\u2003\u3000y",
    "a" * 5000 + "=" * 300 + "0123456789" * 50 + "-_" * 80,
    "e\u0301 \u00e9 \u200d\ufeff\u202e\u2066 \ufb01\uff21 \U0001f469\u200d\U0001f467",
    "\u4f60\u597d\uff0c\u4e16 \u3053\u3093 \ud55c\uad6d \u0627\u0644\u0639 \u05d0 \u0e44\u0e17",
    "\x01\x7f\x85\u2028\u2029\ue000\U0010ffff\U000e0001",
    "",
    " ",
    "\n",
)
"""Strings on which encoders are likely to differ."""


@dataclass(frozen=True)
class Choice:
    """What encodes the text, and why."""

    name: str
    """gigatoken, tokenizers or sentencepiece."""
    description: str
    """For data.json: with its version and the sample on which it was proven equal."""


def candidates(tokenizer: Tokenizer | HuggingFaceTokenizer) -> tuple[str, ...]:
    """The encoders of a tokenizer, fastest first; the last one is the tokenizer itself."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return ("gigatoken", "tokenizers")
    return ("gigatoken", "tokenizers", "sentencepiece")


def choose(
    tokenizer: Tokenizer | HuggingFaceTokenizer,
    sample: Sequence[str],
    say: Callable[[str], None],
) -> Choice:
    """The fastest encoder whose tokens equal the tokenizer's on a sample and on `NASTY`.

    Args:
        tokenizer: the tokenizer.
        sample: texts of the corpus.
        say: called with the reason why a faster one is not used.
    """
    *faster, itself = candidates(tokenizer)
    texts = [*NASTY, *sample]
    wanted = None
    for name in faster:
        wanted = wanted or [np.asarray(tokenizer.encode(text), dtype=np.int64) for text in texts]
        try:
            different = _different(encoder(tokenizer, name), texts, wanted)
        except UnusableError as error:
            say(f"{name} is not used: {error}")
            continue
        if different is None:
            size = sum(len(text) for text in texts)
            characters = f"{size / 1e6:.2g} M" if size >= 1e6 else f"{size:,}"
            return Choice(
                name,
                f"{name} {metadata.version(name)}, equal to {itself} on a sample of "
                f"{characters} characters",
            )
        say(f"{name} is not used: its tokens differ, first in {different[:60]!r}")
    return Choice(itself, f"{itself} {metadata.version(itself)}")


class UnusableError(Exception):
    """An encoder that does not work here; the message says why."""


def encoder(tokenizer: Tokenizer | HuggingFaceTokenizer, name: str) -> Encode:
    """A function that encodes a text without an end of document.

    Raises:
        UnusableError: the package is missing, or does not support the tokenizer.
    """
    if name == candidates(tokenizer)[-1]:
        return lambda text: np.asarray(tokenizer.encode(text), dtype=np.int64)
    make = {"gigatoken": _gigatoken, "tokenizers": _tokenizers}[name]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _without_special(make(_plain(tokenizer.json)), tokenizer)
    try:
        content = to_tokenizer_json(read_small(tokenizer.path, LARGE), control=False)
    except NoEquivalentError as error:
        raise UnusableError(f"of {tokenizer.path.name}, {error}") from error
    return _around_marks(make(content), tokenizer)


def open_encoder(path: Path, name: str) -> tuple[Tokenizer | HuggingFaceTokenizer, Encode]:
    """A tokenizer file, and the encoder that was chosen for it."""
    tokenizer = open_tokenizer(path)
    return tokenizer, encoder(tokenizer, name)


def _different(encode: Encode, texts: Sequence[str], wanted: Sequence[Tokens]) -> str | None:
    """The first text with other tokens."""
    for text, tokens in zip(texts, wanted, strict=True):
        if not np.array_equal(encode(text), tokens):
            return text
    return None


def _gigatoken(content: str) -> Encode:
    try:
        import gigatoken
    except ImportError as error:
        raise UnusableError("the package is missing (pip install 'keel-megatron[data]')") from error
    with _panics_reported():
        found = gigatoken.Tokenizer.from_json(content)

    def encode(text: str) -> Tokens:
        with _panics_reported():
            tokens: Tokens = found.encode(text)
            return tokens

    return encode


@contextmanager
def _panics_reported() -> Iterator[None]:
    """A panic of Rust code, which is no Exception, as an UnusableError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UnusableError((str(error) or repr(error)).splitlines()[0][:200]) from error


def _tokenizers(content: str) -> Encode:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError as error:
        raise UnusableError("the package is missing (pip install 'keel-megatron[data]')") from error
    found = tokenizers.Tokenizer.from_str(content)
    return lambda text: np.asarray(found.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _plain(content: str) -> str:
    """A tokenizer.json without special tokens, which gigatoken would find in a text."""
    parsed = json.loads(content)
    added = parsed.get("added_tokens") or []
    parsed["added_tokens"] = [token for token in added if not token.get("special")]
    return json.dumps(parsed, ensure_ascii=False)


def _without_special(encode: Encode, tokenizer: HuggingFaceTokenizer) -> Encode:
    """Text never becomes a special token, as in `HuggingFaceTokenizer.encode`."""
    is_special = np.zeros(tokenizer.vocab_size, dtype=bool)
    is_special[list(tokenizer.special)] = True

    def checked(text: str) -> Tokens:
        tokens = encode(text)
        if is_special[tokens].any():
            return np.concatenate([encode(part) for part in tokenizer.apart(text)])
        return tokens

    return checked


def _around_marks(encode: Encode, tokenizer: Tokenizer) -> Encode:
    """Space marks become byte tokens, as in `Tokenizer.encode`."""
    mark = np.asarray(tokenizer.encode(SPACE_MARK), dtype=np.int64)

    def around(text: str) -> Tokens:
        if SPACE_MARK not in text:
            return encode(text)
        parts = [encode(part) for part in text.split(SPACE_MARK)]
        joined = [parts[0]]
        for part in parts[1:]:
            joined += [mark, part]
        return np.concatenate(joined)

    return around
