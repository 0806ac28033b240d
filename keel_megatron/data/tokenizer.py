"""Tokenizers: a SentencePiece model, trained here or given, or a Hugging Face tokenizer.json.

One trained here is BPE with byte fallback: encoding is lossless for any text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import sentencepiece

from keel_megatron.config.reading import LARGE, read_small
from keel_megatron.data.huggingface import FILE, HuggingFaceTokenizer
from keel_megatron.data.round_trip import RoundTrip
from keel_megatron.errors import UserError

MODEL: Final = "tokenizer.model"

SAMPLE_CHARACTERS = 50_000_000
"""Training uses about this many characters at most: with more, the merges of a BPE of usual size do
not change noticeably."""
_PIECE_CHARACTERS = 4000
_EOD_ID = 0
# SentencePiece uses this character for spaces, so the character itself must be encoded as bytes.
SPACE_MARK = "\u2581"


def train_tokenizer(documents: Iterable[str | Iterable[str]], vocab_size: int) -> bytes:
    """Train a SentencePiece model and return its file's content.

    Args:
        documents: each a text, or its chunks in order.
        vocab_size: number of pieces.

    Raises:
        UserError: there is no text, or the vocabulary is too large or too small for it.
    """
    model = io.BytesIO()
    pieces = _Remembering(_pieces(documents))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(pieces),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            # Lossless: no normalisation.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=8 * _PIECE_CHARACTERS,
            # One control token, the end of a document; text never matches it.
            eos_id=_EOD_ID,
            eos_piece="<eod>",
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        if pieces.error is not None:
            raise pieces.error from None
        raise UserError(_reason(error, vocab_size)) from error
    return model.getvalue()


class _Remembering:
    """An iterator and what it raised: SentencePiece makes a RuntimeError of any exception.

    A signal's SystemExit is among them, and errors of files that are read on the way.
    """

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._texts
        except BaseException as error:
            self.error = error
            raise


def _pieces(documents: Iterable[str | Iterable[str]]) -> Iterator[str]:
    """Split texts into pieces of bounded length, after line ends where possible."""
    left = SAMPLE_CHARACTERS
    for document in documents:
        text = ""
        for chunk in (document,) if isinstance(document, str) else document:
            text += chunk
            start = 0
            while len(text) - start > _PIECE_CHARACTERS and left > 0:
                end = start + _PIECE_CHARACTERS
                end = text.rfind("\n", start, end) + 1 or end
                left -= end - start
                yield text[start:end]
                start = end
            text = text[start:]
            if left <= 0:
                return
        if text:
            left -= len(text)
            yield text


def _reason(error: RuntimeError, vocab_size: int) -> str:
    """SentencePiece's error as a message about settings."""
    text = str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1].strip()
    setting = f"data.vocab_size: {vocab_size}"
    if "sentences_.empty()" in str(error):
        return "data: the training set is too small to train a tokenizer; use more data"
    if limit := re.search(r"value <= (\d+)", text):
        return f"{setting} is too large for this amount of data; it must be at most {limit[1]}"
    if need := re.search(r"required_chars. \d+ vs (\d+)", text):
        return (
            f"{setting} is too small for the characters in the data; it must be at least {need[1]}"
        )
    return f"{setting} does not work for this data: {text}"


def open_tokenizer(path: Path) -> Tokenizer | HuggingFaceTokenizer:
    """Open a SentencePiece model, a tokenizer.json, or a folder with one of them.

    Raises:
        UserError: it is missing, is neither, or has no end-of-document token.
    """
    if path.is_dir():
        names = [name for name in (FILE, MODEL) if (path / name).is_file()]
        if not names:
            raise UserError(f"data.tokenizer: there is no {FILE} or {MODEL} in {path}")
        path = path / names[0]
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else Tokenizer(path)


class Tokenizer(RoundTrip):
    """A trained SentencePiece model.

    Attributes:
        path: the file.
        vocab_size: number of pieces.
        eod: the token that ends each document: the model's end-of-sentence token.
        eod_name: its name.
        special_names: the control pieces: tokens by name.

    Raises:
        UserError: the file is missing or not a SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(read_small(path, LARGE))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"data.tokenizer: {path} cannot be read: {reason}") from error
        except RuntimeError as error:
            raise UserError(
                f"data.tokenizer: {path} cannot be read as a SentencePiece model"
            ) from error
        self.vocab_size = int(self._model.get_piece_size())
        self.eod = int(self._model.eos_id())
        if self.eod < 0:
            raise UserError(
                f"data.tokenizer: {path} has no end-of-sentence token, which ends each document; "
                "train it with eos_id set"
            )
        self.eod_name = self.name_of(self.eod)
        pieces = range(self.vocab_size)
        self.special_names = {self.name_of(n): n for n in pieces if self._model.is_control(n)}
        self.unknown = int(self._model.unk_id())
        self._space_mark = [
            int(self._model.piece_to_id(f"<0x{byte:02X}>")) for byte in SPACE_MARK.encode()
        ]

    def encode(self, text: str) -> list[int]:
        """Encode a text."""
        parts = self._model.encode(text.split(SPACE_MARK))
        tokens: list[int] = parts[0]
        for part in parts[1:]:
            tokens += self._space_mark + part
        return tokens

    def encode_special(self, text: str) -> list[int]:
        """Encode a text in which the name of a special token is that token."""
        names = sorted(self.special_names, key=len, reverse=True)
        tokens: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, names))})", text):
            name = self.special_names.get(part)
            tokens += self.encode(part) if name is None else [name]
        return tokens

    def name_of(self, token: int) -> str:
        """A token's piece."""
        return str(self._model.id_to_piece(token))

    def decode(self, tokens: list[int]) -> str:
        """Decode tokens; the end of a document is empty."""
        return str(self._model.decode([token for token in tokens if token != self.eod]))

    def file_content(self) -> bytes:
        """Content of the file."""
        return read_small(self.path, LARGE)
