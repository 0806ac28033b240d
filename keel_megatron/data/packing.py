"""Conversations packed into sequences, none of them cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel_megatron.data.sequences import Documents, Sequence, SequenceDataset, check_tokens
from keel_megatron.errors import UserError


@dataclass(frozen=True)
class PackedIndex:
    """Which documents each sequence holds, as arrays in memory or in mapped files."""

    documents: NDArray[Any]
    """int32 or int64 [documents]: those of the first sequence, then of the second, ..., by their
    number in the source. Documents longer than a sequence are not among them."""
    firsts: NDArray[np.int64]
    """int64 [sequences + 1]: place in `documents` of each sequence's first, and their number."""

    def is_consistent(self) -> bool:
        """Whether the arrays belong together; of files, which may be damaged."""
        return len(self.firsts) > 0 and int(self.firsts[-1]) == len(self.documents)


def build_packing(documents: Documents, seq_length: int, seed: int) -> PackedIndex:
    """Pack the documents of one part of a source.

    The longest first, each into the fullest sequence that has room for it (best-fit decreasing);
    then the sequences are shuffled. A sequence has seq_length + 1 tokens: the last one is a label
    only. Takes about 2 s per million documents.

    Args:
        documents: the part.
        seq_length: tokens per sequence.
        seed: the run's seed.
    """
    lengths, size = documents.lengths(), seq_length + 1
    random = np.random.RandomState(seed % 2**32)
    shuffled = random.permutation(len(lengths))
    shuffled = shuffled[lengths[shuffled] <= size]
    longest_first = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    sequences = best_fit(lengths[longest_first].tolist(), size)
    order = random.permutation(len(sequences))
    places = [place for number in order.tolist() for place in sequences[number]]
    counts = [len(sequences[number]) for number in order.tolist()]
    small = int(documents.offsets[-1]) < 2**31
    numbers = documents.numbers[longest_first[np.array(places, dtype=np.int64)]]
    return PackedIndex(
        numbers.astype(np.int32 if small else np.int64),
        np.cumsum([0, *counts], dtype=np.int64),
    )


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Put items into bins, each into the fullest that has room for it.

    Args:
        lengths: of the items; at most `size` each.
        size: of a bin.

    Returns:
        The items of each bin, by their place in `lengths`.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(size + 1)]
    rooms = 0  # bit r: there are bins with room for exactly r
    for item, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[number].append(item)
        else:
            room, number = size, len(bins)
            bins.append([item])
        if room > length:
            with_room[room - length].append(number)
            rooms |= 1 << (room - length)
    return bins


class PackedSequences(SequenceDataset):
    """One epoch of a part of a chat source: whole conversations, padded to a sequence.

    The padding is a document of its own, of tokens that do not count in the loss.

    Args:
        documents: the part.
        index: which documents each sequence holds.
        seq_length: tokens per sequence.
        vocab_size: larger tokens are refused.
        name: of the source, for messages.
        padding: the token of the padding.

    Raises:
        UserError: every conversation is longer than a sequence.
    """

    def __init__(
        self,
        documents: Documents,
        index: PackedIndex,
        seq_length: int,
        vocab_size: int,
        name: str,
        padding: int,
    ) -> None:
        self.seq_length = seq_length
        self.name = name
        self._documents = documents
        self._packing = index
        self._vocab_size = vocab_size
        self._padding = padding
        self._lengths = documents.all_lengths()
        if not len(self):
            raise UserError(
                f"data.seq_length: all conversations of {name} are longer than {seq_length + 1} "
                f"tokens (data.seq_length + 1); the shortest has {documents.lengths().min()}"
            )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._packing.firsts) - 1

    def read(self, number: int, *, tokens: bool = True) -> Sequence:
        """A sequence and its next token; without `tokens`, only where its documents end.

        Raises:
            UserError: a token is outside of the vocabulary.
        """
        first, stop = self._packing.firsts[number : number + 2].tolist()
        documents = self._packing.documents[first:stop].tolist()
        lengths = [int(self._lengths[document]) for document in documents]
        rest = self.seq_length + 1 - sum(lengths)
        with_rest = (*lengths, rest) if rest else tuple(lengths)
        if not tokens:
            return Sequence(None, with_rest)
        pairs = list(zip(documents, lengths, strict=True))
        padding = np.full(rest, self._padding, dtype=np.int64)
        pieces = [self._documents.read(document, 0, length) for document, length in pairs]
        read = np.concatenate([*pieces, padding], dtype=np.int64)
        check_tokens(read, self._vocab_size, self.name)
        counts = [self._documents.read_counts(document, length) for document, length in pairs]
        return Sequence(read, with_rest, np.concatenate([*counts, np.zeros(rest, np.bool_)]))

    def describe(self) -> str:
        """How many conversations are in how many sequences, and what is left out, as text."""
        packing, size = self._packing, self.seq_length + 1
        tokens = int(self._lengths[packing.documents].sum(dtype=np.int64))
        share = tokens / (len(self) * size)
        left_out = len(self._documents.numbers) - len(packing.documents)
        text = (
            f"{len(packing.documents):,} conversations in {len(self):,} sequences, {share:.1%} of "
            "their tokens, the rest is padding"
        )
        if left_out:
            text += f"; {left_out:,} longer than data.seq_length + 1 = {size:,} tokens are left out"
        return text
