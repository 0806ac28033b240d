"""Rows of tokens, packed into sequences of a model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keel_megatron.evaluation.rows import Row

Numbers = NDArray[np.int32]


@dataclass(frozen=True)
class Packed:
    """Rows in sequences; each array is int32 [sequences, s]."""

    tokens: Numbers
    labels: Numbers
    """The next token."""
    documents: Numbers
    """Number of the token's row within its sequence."""
    rows: Numbers
    """Number of the row whose score the label belongs to; of no row, the number of all rows."""


def pack(rows: Sequence[Row], length: int, filler: int, *, together: bool) -> Packed:
    """Pack rows into sequences: the longest, and behind it the shortest as long as they fit.

    Args:
        rows: none has more than `length` + 1 tokens; its last token is a label only.
        length: s.
        filler: the token that fills sequences up.
        together: several rows may share a sequence; attention must then stay within documents.
    """
    groups = _groups(rows, length) if together else [[number] for number in range(len(rows))]
    shape = (len(groups), length)
    tokens, labels = np.full(shape, filler, np.int32), np.full(shape, filler, np.int32)
    documents, scored = np.zeros(shape, np.int32), np.full(shape, len(rows), np.int32)
    for sequence, group in enumerate(groups):
        start = 0
        for document, number in enumerate(group):
            row = rows[number]
            end = start + len(row.tokens) - 1
            tokens[sequence, start:end] = row.tokens[:-1]
            labels[sequence, start:end] = row.tokens[1:]
            documents[sequence, start:end] = document
            scored[sequence, end - row.scored : end] = number
            start = end
        documents[sequence, start:] = len(group)
    return Packed(tokens, labels, documents, scored)


def _groups(rows: Sequence[Row], length: int) -> list[list[int]]:
    """Numbers of the rows of each sequence."""
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
    groups: list[list[int]] = []
    first, last = 0, len(order) - 1
    while first <= last:
        group, left = [order[first]], length - len(rows[order[first]].tokens) + 1
        first += 1
        while first <= last and len(rows[order[last]].tokens) - 1 <= left:
            group.append(order[last])
            left -= len(rows[order[last]].tokens) - 1
            last -= 1
        groups.append(group)
    return groups
