"""Rows of tokens, packed into sequences of a model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keel_megatron.evaluation.rows import Row

Numbers = NDArray[np.int32]


@dataclass(frozen=True)
class Sequences:
    """Rows in sequences; each array is int32 [sequences, s]."""

    tokens: Numbers
    labels: Numbers
    """The next token."""
    documents: Numbers
    """Number of the token's row within its sequence."""
    rows: Numbers
    """Number of the row whose score the label belongs to; of no row, the number of all rows."""


class Packing:
    """Rows, and which of them share a sequence; compact, because every rank has it.

    A sequence has the longest row that is left, and behind it the shortest as long as they fit.

    Args:
        rows: none has more than `length` + 1 tokens; its last token is a label only.
        length: s.
        filler: the token that fills sequences up.
        together: several rows may share a sequence; attention must then stay within documents.
    """

    def __init__(self, rows: Sequence[Row], length: int, filler: int, *, together: bool) -> None:
        self.length, self.filler, self.rows = length, filler, len(rows)
        self._tokens = np.fromiter((token for row in rows for token in row.tokens), np.int32)
        self._ends = np.cumsum([len(row.tokens) for row in rows])
        self._scored = np.array([row.scored for row in rows])
        sizes = [len(row.tokens) - 1 for row in rows]
        alone = [[number] for number in range(len(rows))]
        self._groups = _groups(sizes, length) if together else alone

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._groups)

    def sequences(self, first: int, count: int) -> Sequences:
        """`count` sequences from the `first` on; behind the last one they hold nothing."""
        shape = (count, self.length)
        tokens, labels = (
            np.full(shape, self.filler, np.int32),
            np.full(shape, self.filler, np.int32),
        )
        documents, rows = np.zeros(shape, np.int32), np.full(shape, self.rows, np.int32)
        for place, group in enumerate(self._groups[first : first + count]):
            start = 0
            for document, number in enumerate(group):
                before = self._ends[number - 1] if number else 0
                row = self._tokens[before : self._ends[number]]
                end = start + len(row) - 1
                tokens[place, start:end], labels[place, start:end] = row[:-1], row[1:]
                documents[place, start:end] = document
                rows[place, end - self._scored[number] : end] = number
                start = end
            documents[place, start:] = len(group)
        return Sequences(tokens, labels, documents, rows)


def _groups(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of the rows of each sequence."""
    order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    groups: list[list[int]] = []
    first, last = 0, len(order) - 1
    while first <= last:
        group, left = [order[first]], length - sizes[order[first]]
        first += 1
        while first <= last and sizes[order[last]] <= left:
            group.append(order[last])
            left -= sizes[order[last]]
            last -= 1
        groups.append(group)
    return groups
