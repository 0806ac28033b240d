"""Writes Megatron-core's indexed tokens (.bin and .idx) and their statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from keel_megatron.data.corpus import Document
from keel_megatron.data.tokenizer import Tokenizer

_SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Indexed:
    """Statistics of the tokens of one prefix."""

    documents: int
    tokens: int
    unigram_entropy: float
    """Nats per token: -sum p log p over the tokens' own frequencies."""


def write_indexed(
    documents: Iterable[Document], tokenizer: Tokenizer, prefix: Path, log: Callable[[str], None]
) -> Indexed:
    """Encode documents, each ended by the tokenizer's `eod`, into `prefix`.bin and `prefix`.idx.

    Tokens are uint16 where the vocabulary fits, else int32.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    written = 0
    said = time.monotonic()
    for document in documents:
        tokens = np.asarray([*tokenizer.encode(document.text), tokenizer.eod], dtype=dtype)
        builder.add_document(tokens, [len(tokens)])
        counts += np.bincount(tokens, minlength=len(counts))
        written += 1
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            log(f"{prefix.name}: {written:,} documents, {counts.sum():,} tokens so far")
    builder.finalize(f"{prefix}.idx")
    return Indexed(written, int(counts.sum()), entropy(counts))


def entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution with these counts."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
