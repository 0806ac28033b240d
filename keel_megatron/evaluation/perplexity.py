"""Perplexity and bits per byte of documents, and of all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class DocumentScore:
    """What a model pays for a document."""

    name: str
    """The file, with `@` and byte offset or row of a record."""
    bytes: int = 0
    """Of its text as UTF-8."""
    tokens: int = 0
    nats: float = 0.0
    """Negative log probability of all its tokens."""
    lost: int = 0
    """Characters that its tokens do not hold."""

    def record(self) -> dict[str, Any]:
        """For JSON; None where there is nothing to divide by."""
        return {
            "document": self.name,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "nats": self.nats,
            "bits_per_byte": _bits(self.nats, self.bytes),
            "perplexity": _exp(_mean(self.nats, self.tokens)),
            "lost_characters": self.lost,
        }


@dataclass(frozen=True)
class Total:
    """Of several documents: sums, and the means over all bytes and over all tokens.

    The standard errors are those of documents drawn at random, of means that are ratios of sums
    (linearised; Cochran, Sampling Techniques, 1977, section 6.3). None: fewer than two documents.
    """

    documents: int
    bytes: int
    tokens: int
    nats: float
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None
    perplexity: float | None
    perplexity_stderr: float | None
    lost_characters: int


def total(documents: Sequence[DocumentScore]) -> Total:
    """The documents together."""
    size = sum(document.bytes for document in documents)
    tokens = sum(document.tokens for document in documents)
    nats = math.fsum(document.nats for document in documents)
    bits_error = _standard_error(documents, lambda one: one.bytes)
    nats_error = _standard_error(documents, lambda one: one.tokens)
    perplexity = _exp(_mean(nats, tokens))
    return Total(
        documents=len(documents),
        bytes=size,
        tokens=tokens,
        nats=nats,
        bits_per_byte=_bits(nats, size),
        bits_per_byte_stderr=None if bits_error is None else bits_error / math.log(2),
        perplexity=perplexity,
        perplexity_stderr=(
            None if nats_error is None or perplexity is None else nats_error * perplexity
        ),
        lost_characters=sum(document.lost for document in documents),
    )


def _standard_error(
    documents: Sequence[DocumentScore], size_of: Callable[[DocumentScore], int]
) -> float | None:
    """Standard error of sum(nats) / sum(size)."""
    count = len(documents)
    size = sum(map(size_of, documents))
    if count < 2 or not size:
        return None
    mean = math.fsum(document.nats for document in documents) / size
    squares = math.fsum((one.nats - mean * size_of(one)) ** 2 for one in documents)
    return math.sqrt(squares * count / (count - 1)) / size


def _mean(nats: float, count: int) -> float | None:
    return nats / count if count else None


def _bits(nats: float, size: int) -> float | None:
    return nats / math.log(2) / size if size else None


def _exp(nats: float | None) -> float | None:
    try:
        return None if nats is None else math.exp(nats)
    except OverflowError:
        return math.inf
