"""The sequences of one part of a source, in the order of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel_megatron.data.dataset import Part, PlacedShard, Source
from keel_megatron.data.shards import TokenShard, map_mask, read_held_out
from keel_megatron.errors import UserError


@dataclass(frozen=True)
class Index:
    """Order of documents and sequences, as arrays in memory or in mapped files."""

    documents: NDArray[Any]
    """int32 or int64 [documents]: the shuffled documents, by their number in the source."""
    ends: NDArray[np.int64]
    """int64 [documents]: end of each shuffled document in the stream of all tokens."""
    order: NDArray[Any]
    """uint32 or int64 [sequences]: the shuffled sequences, by their number in the stream."""

    def is_consistent(self) -> bool:
        """Whether the arrays belong together; of files, which may be damaged."""
        return len(self.ends) == len(self.documents) > 0


@dataclass(frozen=True)
class Sequence:
    """One sequence and the token that follows it."""

    tokens: NDArray[np.int64] | None
    """int64 [seq_length + 1], or None if they were not asked for."""
    lengths: tuple[int, ...]
    """Tokens of each document in it, in order; their sum is seq_length + 1."""
    counts: NDArray[np.bool_] | None = None
    """bool [seq_length + 1]: which tokens count in the loss; None: all of them."""


class Documents:
    """The documents of one part of a source, over all of its shards.

    Attributes:
        shards: the shards with documents of this part.
        offsets: int64 [shards + 1]: number of documents before each.

    Raises:
        UserError: a shard is damaged.
    """

    def __init__(self, source: Source, part: Part) -> None:
        self._part = part
        self._placed = source.of(part)
        self.shards = [TokenShard(shard.prefix) for shard in self._placed]
        self._masks = [
            map_mask(placed.path("mask"), len(shard.tokens)) if source.record.is_chat else None
            for placed, shard in zip(self._placed, self.shards, strict=True)
        ]
        self.offsets = np.cumsum([0, *map(len, self.shards)])

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """int64 [documents]: their numbers in the source, which counts through all of `shards`.

        Ascending. Computed when the order is; 8 bytes per document.
        """
        places = zip(self._placed, self.shards, self.offsets[:-1], strict=True)
        chosen = [offset + _chosen(one, len(shard), self._part) for one, shard, offset in places]
        return np.concatenate(chosen) if chosen else np.empty(0, np.int64)

    def lengths(self) -> NDArray[np.int32]:
        """int32 [documents]: tokens of each."""
        lengths: NDArray[np.int32] = self.all_lengths()[self.numbers]
        return lengths

    def all_lengths(self) -> NDArray[np.int32]:
        """int32: tokens of all documents of the source, by their number in it."""
        if not self.shards:
            return np.empty(0, np.int32)
        return np.concatenate([shard.lengths for shard in self.shards])

    def read(self, number: int, offset: int, length: int) -> NDArray[Any]:
        """`length` tokens of a document of the source from `offset` on."""
        shard, document = self._place(number)
        return self.shards[shard].read(document, offset, length)

    def read_counts(self, number: int, length: int) -> NDArray[np.bool_]:
        """Which of the first `length` tokens of a conversation count in the loss."""
        shard, document = self._place(number)
        mask, start = self._masks[shard], self.shards[shard].place(document)
        assert mask is not None
        counts: NDArray[np.bool_] = mask[start : start + length] == 1
        return counts

    def _place(self, number: int) -> tuple[int, int]:
        """The shard of a document of the source, and its number there."""
        shard = int(np.searchsorted(self.offsets, number, side="right")) - 1
        return shard, number - int(self.offsets[shard])


def _chosen(shard: PlacedShard, documents: int, part: Part) -> NDArray[np.int64]:
    """The documents of a shard that belong to a part."""
    everything = np.arange(documents, dtype=np.int64)
    if shard.record.part != "both":
        return everything
    held_out = np.empty(0, np.int64)
    if "npy" in shard.record.files:
        held_out = read_held_out(shard.path("npy"), documents)
    return held_out if part == "validation" else np.delete(everything, held_out)


def build_index(documents: Documents, seq_length: int, seed: int) -> Index:
    """The order of one part of a source, that of Megatron-core's GPTDataset.

    Takes about a second per 10 million documents.

    Args:
        documents: the part.
        seq_length: tokens per sequence.
        seed: the run's seed.
    """
    lengths, count = documents.lengths(), len(documents.numbers)
    random = np.random.RandomState(seed % 2**32)
    shuffled = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    random.shuffle(shuffled)
    ends = np.cumsum(lengths[shuffled], dtype=np.int64)
    tokens = int(ends[-1]) if count else 0
    sequences = max(0, tokens - 1) // seq_length
    order = np.arange(sequences, dtype=np.uint32 if sequences < 2**32 - 2 else np.int64)
    random.shuffle(order)
    small = int(documents.offsets[-1]) < 2**31
    numbers = documents.numbers[shuffled].astype(np.int32 if small else np.int64)
    return Index(numbers, ends, order)


class SequenceDataset:
    """One epoch of a part of a source: the tokens of its shuffled documents, in sequences.

    Args:
        documents: the part.
        index: its order.
        seq_length: tokens per sequence.
        vocab_size: larger tokens are refused.
        name: of the source, for messages.
    """

    def __init__(
        self, documents: Documents, index: Index, seq_length: int, vocab_size: int, name: str
    ) -> None:
        self.seq_length = seq_length
        self.name = name
        self._documents = documents
        self._index = index
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        """Number of sequences; a remainder at the end of the stream is dropped."""
        return len(self._index.order)

    def read(self, number: int, *, tokens: bool = True) -> Sequence:
        """A sequence and its next token; without `tokens`, only where its documents end.

        Raises:
            UserError: a token is outside of the vocabulary.
        """
        pieces = list(self._pieces(number))
        lengths = tuple(length for _document, _offset, length in pieces)
        if not tokens:
            return Sequence(None, lengths)
        read = np.concatenate([self._documents.read(*piece) for piece in pieces], dtype=np.int64)
        check_tokens(read, self._vocab_size, self.name)
        return Sequence(read, lengths)

    def _pieces(self, number: int) -> Iterator[tuple[int, int, int]]:
        """(document, offset, tokens) of each piece of a sequence and its next token."""
        index = self._index
        start = int(index.order[number]) * self.seq_length
        stop = start + self.seq_length + 1
        place = int(np.searchsorted(index.ends, start, side="right"))
        begin = int(index.ends[place - 1]) if place else 0
        while start < stop:
            end = int(index.ends[place])
            length = min(stop, end) - start
            yield int(index.documents[place]), start - begin, length
            start, begin, place = start + length, end, place + 1


def check_tokens(tokens: NDArray[np.int64], vocab_size: int, source: str) -> None:
    """Check that tokens of a source are in the vocabulary.

    Raises:
        UserError: one is not.
    """
    if tokens.view(np.uint64).max() >= vocab_size:
        raise UserError(
            f"data.dataset: source {source} has a token {tokens.max()}, outside of the "
            f"vocabulary of {vocab_size}; check it with keel data verify"
        )
