"""Tokenizers in Hugging Face's tokenizer.json format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from keel_megatron.config.reading import LARGE, parse_json, read_small
from keel_megatron.data.round_trip import RoundTrip
from keel_megatron.errors import UserError

FILE: Final = "tokenizer.json"
EOD_KEY: Final = "eod_token"
"""A key of ours in tokenizer.json; `tokenizers` does not know it."""
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<eod>")


class HuggingFaceTokenizer(RoundTrip):
    """A tokenizer.json.

    Text never becomes a special token: a special token's name in a text is encoded as text.

    Args:
        path: the file, or its folder.

    Attributes:
        path: the file.
        vocab_size: largest token id plus one.
        eod: the token that ends each document: the eos token of tokenizer_config.json or
            special_tokens_map.json beside the file, else one with a usual name.
        eod_name: its name.
        special: ids of all special tokens.
        special_names: the same tokens by name.

    Raises:
        UserError: the file is missing or no tokenizer, it has no end-of-text token, or the package
            `tokenizers` is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / FILE if path.is_dir() else path
        content = _read(self.path)
        self._given_eod = content.pop(EOD_KEY, None)
        self.json = _for_encoding(content)
        self._tokenizer = _parsed(self.json, self.path)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self._names = {n: token.content for n, token in added.items() if token.special}
        self.eod_name = self._find_eod(vocabulary)
        self.eod = vocabulary[self.eod_name]
        self._names.setdefault(self.eod, self.eod_name)
        self.special = frozenset(self._names)
        self.special_names = {name: number for number, name in self._names.items()}
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self.unknown = vocabulary.get(unknown, -1) if isinstance(unknown, str) else -1

    def encode(self, text: str) -> list[int]:
        """Encode a text."""
        tokens = self._encode(text)
        if self.special.isdisjoint(tokens):
            return tokens
        return [token for part in self.apart(text) for token in self._encode(part)]

    def encode_special(self, text: str) -> list[int]:
        """Encode a text in which the name of a special token is that token."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self._encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def name_of(self, token: int) -> str:
        """A token's name in the vocabulary."""
        return str(self._tokenizer.id_to_token(token))

    def apart(self, text: str) -> list[str]:
        """The text cut inside of every name of a special token.

        For vocabularies whose model finds the names by itself, even if they are not matched.
        """
        parts = [text]
        for name in sorted(self._names.values(), key=len, reverse=True):
            if len(name) > 1:
                parts = [piece for part in parts for piece in _cut(part, name)]
        return parts

    def decode(self, tokens: list[int]) -> str:
        """Decode tokens; the end of a document is empty."""
        kept = [token for token in tokens if token != self.eod]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def file_content(self) -> bytes:
        """The tokenizer.json with which a folder without the other files has the same `eod`."""
        content = read_small(self.path, LARGE)
        if self._given_eod is None and self.eod_name != _usual_eod(self._tokenizer):
            return json.dumps({**parse_json(content), EOD_KEY: self.eod_name}).encode()
        return content

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def _find_eod(self, vocabulary: dict[str, int]) -> str:
        """Name of the end-of-document token."""
        for name in (self._given_eod, *_configured_eod(self.path.parent)):
            if isinstance(name, str) and name in vocabulary:
                return name
        usual = _usual_eod(self._tokenizer)
        if usual is None:
            raise UserError(
                f"data.tokenizer: {self.path} has no end-of-text token, which ends each document; "
                f"name it as eos_token in {_CONFIGS[0]} beside it"
            )
        return usual


def _read(path: Path) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    try:
        content = parse_json(read_small(path, LARGE))
    except (OSError, ValueError) as error:
        raise _no_tokenizer(path) from error
    if not isinstance(content, dict):
        raise _no_tokenizer(path)
    return content


def _for_encoding(content: dict[str, Any]) -> str:
    """The tokenizer without what changes tokens at random or by length: dropout, truncation."""
    content = {**content, "truncation": None, "padding": None}
    if isinstance(content.get("model"), dict) and content["model"].get("dropout"):
        content["model"] = {**content["model"], "dropout": None}
    return json.dumps(content, ensure_ascii=False)


def _parsed(text: str, path: Path) -> Any:
    """The tokenizer of the package `tokenizers`, in one thread."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"data.tokenizer: {path} needs the package tokenizers: "
            "pip install 'keel-megatron[data]'"
        ) from error
    try:
        found = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises Exception itself
        raise _no_tokenizer(path) from error
    found.encode_special_tokens = True
    return found


def _no_tokenizer(path: Path) -> UserError:
    return UserError(f"data.tokenizer: {path} cannot be read as a Hugging Face tokenizer.json")


def _configured_eod(folder: Path) -> Iterable[object]:
    """The eos token in the files beside tokenizer.json."""
    for name in _CONFIGS:
        try:
            content = parse_json(read_small(folder / name, LARGE))
        except (OSError, ValueError):
            continue
        token = content.get("eos_token") if isinstance(content, dict) else None
        yield token.get("content") if isinstance(token, dict) else token


def _usual_eod(tokenizer: Any) -> str | None:
    """The first usual name of an end-of-text token in the vocabulary."""
    found = (name for name in _USUAL_EOD if tokenizer.token_to_id(name) is not None)
    return next(found, None)


def _cut(text: str, name: str) -> list[str]:
    """The text cut after the first character of each occurrence of a name."""
    first, *rest = text.split(name)
    parts = [first]
    for part in rest:
        parts[-1] += name[0]
        parts.append(name[1:] + part)
    return parts
