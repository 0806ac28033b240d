"""tokenizer.json (Hugging Face `tokenizers`) of a SentencePiece BPE model."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from keel_megatron.data.tokenizer import SPACE_MARK

# Field numbers and values of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_BPE: Final = 2
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE = 2, 3, 4, 5

Value = int | bytes


class NoEquivalentError(ValueError):
    """A SentencePiece model that tokenizer.json cannot represent; the message says why."""


@dataclass
class _Model:
    """The parts of a SentencePiece model that determine its tokens."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    """(text, score, type), by token id."""
    trainer: dict[int, Value] = field(default_factory=dict)
    normalizer: dict[int, Value] = field(default_factory=dict)


def to_tokenizer_json(model: bytes, *, control: bool = True) -> str:
    """Convert a SentencePiece BPE model with byte fallback, without normalisation.

    SentencePiece merges by score, and equal scores from the left; `tokenizers` merges by rank. The
    tokens are the same unless two merges that form the same piece overlap, so a caller compares
    them on its text.

    Args:
        model: content of the .model file.
        control: list control pieces as special tokens, which `tokenizers` finds in a text too
            unless it is told otherwise; without, text never becomes a control piece.

    Returns:
        The file's content. Text must not contain U+2581, which stands for a space: SentencePiece's
        own byte tokens represent it (`data.tokenizer.Tokenizer.encode`).

    Raises:
        NoEquivalentError: the model is of another kind.
    """
    parsed = _parsed(model)
    _check(parsed)
    ids = {piece: number for number, (piece, _, _) in enumerate(parsed.pieces)}
    unknown = next((piece for piece, _, kind in parsed.pieces if kind == _UNKNOWN), None)
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    ]
    if parsed.normalizer.get(_DUMMY_PREFIX, 1):
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE_MARK})
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added(parsed) if control else [],
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": _decoder(has_prefix=len(normalizers) > 1),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": unknown,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": ids,
                "merges": _merges(parsed),
            },
        },
        ensure_ascii=False,
    )


def normal_pieces(model: bytes) -> list[str]:
    """The pieces of a SentencePiece BPE model that text can become, with spaces as spaces.

    Raises:
        NoEquivalentError: the model is not BPE, or changes a text before it is encoded.
    """
    parsed = _parsed(model)
    _check(parsed)
    if parsed.normalizer.get(_DUMMY_PREFIX, 1):
        raise NoEquivalentError("it adds a space before a text")
    kinds = (_NORMAL, _USER_DEFINED)
    return [piece.replace(SPACE_MARK, " ") for piece, _, kind in parsed.pieces if kind in kinds]


def _check(model: _Model) -> None:
    trainer, normalizer = model.trainer, model.normalizer
    for is_other, reason in (
        (trainer.get(_MODEL_TYPE, 1) != _BPE, "it is not BPE"),
        (not trainer.get(_BYTE_FALLBACK, 0), "it has no byte fallback"),
        (bool(trainer.get(_SUFFIX, 0)), "it marks spaces at the end of words"),
        (bool(normalizer.get(_CHARSMAP, b"")), "it normalises characters"),
        (bool(normalizer.get(_REMOVE_SPACES, 1)), "it removes white space"),
        (not normalizer.get(_ESCAPE, 1), "it does not mark spaces"),
        (any(kind == _USER_DEFINED for _, _, kind in model.pieces), "it has user-defined pieces"),
    ):
        if is_other:
            raise NoEquivalentError(reason)


def _added(model: _Model) -> list[dict[str, Any]]:
    """The control pieces as special tokens."""
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": piece, **options, "special": True}
        for number, (piece, _, kind) in enumerate(model.pieces)
        if kind in (_CONTROL, _UNKNOWN)
    ]


def _decoder(*, has_prefix: bool) -> dict[str, Any]:
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def _merges(model: _Model) -> list[tuple[str, str]]:
    """Every pair of pieces that forms another piece, best score first."""
    scores = {piece: score for piece, score, kind in model.pieces if kind == _NORMAL}
    ids = {piece: number for number, (piece, _, _) in enumerate(model.pieces)}
    found = []
    for piece, score in scores.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in scores and right in scores:
                found.append((-score, ids[piece], ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _parsed(model: bytes) -> _Model:
    parsed = _Model()
    try:
        for number, value in _fields(model):
            if number == _PIECES and isinstance(value, bytes):
                parsed.pieces.append(_piece(value))
            elif number == _TRAINER and isinstance(value, bytes):
                parsed.trainer = dict(_fields(value))
            elif number == _NORMALIZER and isinstance(value, bytes):
                parsed.normalizer = dict(_fields(value))
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise NoEquivalentError("it is damaged") from error
    return parsed


def _piece(content: bytes) -> tuple[str, float, int]:
    """(text, score, type) of a piece."""
    fields = dict(_fields(content))
    text, score, kind = fields.get(_PIECE, b""), fields.get(_SCORE, bytes(4)), fields.get(_TYPE, 1)
    if not (isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)):
        raise NoEquivalentError("it is damaged")
    return text.decode(), struct.unpack("<f", score)[0], kind


def _fields(content: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of each field of a protocol buffer; fixed-size numbers as bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(content, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise NoEquivalentError("it is damaged")
        yield number, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and the offset after it."""
    number = shift = 0
    while True:
        byte = content[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
