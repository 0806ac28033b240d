"""Tokens to micro-batches, in an order that depends on the seed and the samples consumed alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keel_megatron.config.errors import UserError
from keel_megatron.config.run import RunConfig

_HEAD = struct.Struct("<9sQBQQ")
"""Of an index: its mark, version, type of the tokens, and how many sequences and documents."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one replica; every tensor is [b, s]."""

    tokens: Tensor
    """int64."""
    labels: Tensor
    """int64: the token that follows."""
    loss_mask: Tensor
    """fp32: 1 where the label counts."""
    position_ids: Tensor
    """int64."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        if device.type == self.tokens.device.type:
            return self
        moved = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.tokens, self.labels, self.loss_mask, self.position_ids)
        )
        return Batch(*moved)


class SequenceDataset:
    """One epoch of `prefix`.bin: the shuffled documents' tokens, cut into sequences.

    The order is Megatron-core's GPTDataset's. It is drawn again at every start, in about a second
    per 10 million documents, so no index files can be missing, damaged or replaced. Takes 12 bytes
    of memory a document and 4 a sequence.

    Args:
        prefix: path of the indexed tokens, without .bin and .idx.
        seq_length: tokens of a sequence.
        seed: the run's seed.

    Raises:
        UserError: the index does not fit the tokens.
    """

    def __init__(self, prefix: Path, seq_length: int, seed: int) -> None:
        self.seq_length = seq_length
        self._indexed = _open(prefix)
        lengths = self._indexed.sequence_lengths
        random = np.random.RandomState(seed % 2**32)
        self._documents = np.arange(len(lengths), dtype=np.int32)
        random.shuffle(self._documents)
        # Where each of the shuffled documents ends in the stream of all of them.
        self._ends = np.cumsum(lengths[self._documents], dtype=np.int64)
        count = max(0, int(self._ends[-1]) - 1) // seq_length
        self._order = np.arange(count, dtype=np.uint32 if count < 2**32 - 2 else np.int64)
        random.shuffle(self._order)

    def __len__(self) -> int:
        """Sequences; what is left over at the stream's end is no sequence."""
        return len(self._order)

    def __getitem__(self, number: int) -> Tensor:
        """A sequence and the token that follows it, int64 [seq_length + 1]."""
        start = int(self._order[number]) * self.seq_length
        stop = start + self.seq_length + 1
        parts = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = int(self._ends[place])
            document = int(self._documents[place])
            offset = start - (end - int(self._indexed.sequence_lengths[document]))
            length = min(stop, end) - start
            parts.append(self._indexed.get(document, offset=offset, length=length))
            start, place = start + length, place + 1
        return torch.from_numpy(np.concatenate(parts, dtype=np.int64))


def _open(prefix: Path) -> Any:
    """Megatron-core's IndexedDataset, which maps both files and reads no Python object.

    Raises:
        UserError: as SequenceDataset.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    index = prefix.with_name(prefix.name + ".idx")
    tokens = prefix.with_name(prefix.name + ".bin")
    try:
        _check_index(index, tokens)
        return IndexedDataset(str(prefix))
    except (OSError, ValueError, struct.error) as error:
        raise UserError(
            f"data.cache_dir: {index} is not an index of {tokens.name} ({error}); delete that "
            "folder to prepare it again"
        ) from error


def _check_index(index: Path, tokens: Path) -> None:
    """See that an index has the form of Megatron-core's, and that all tokens it names are there."""
    from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType

    with index.open("rb") as stream:
        magic, version, code, count, documents = _HEAD.unpack(stream.read(_HEAD.size))
    if (magic, version) != (_INDEX_HEADER, 1) or count == 0:
        raise ValueError("its head is another")
    if index.stat().st_size != _HEAD.size + 12 * count + 8 * documents:
        raise ValueError("its size is another")
    width, size = DType.size(DType.dtype_from_code(code)), tokens.stat().st_size
    lengths = np.fromfile(index, "<i4", count, offset=_HEAD.size).astype(np.int64)
    starts = np.fromfile(index, "<i8", count, offset=_HEAD.size + 4 * count)
    # The starts by themselves, too: their sums with the lengths may overflow.
    if lengths.min() < 1 or starts.min() < 0 or starts.max() > size:
        raise ValueError("it names no tokens")
    if (starts + width * lengths).max() > size or width * lengths.sum() > size:
        raise ValueError("it names more tokens than there are")


class SampleOrder:
    """Which sample of the dataset is the k-th of the run: a new permutation every epoch.

    Neither the number of steps, nor the batch size, nor the layout has a say.

    Args:
        samples: samples of the dataset.
        seed: the run's seed.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, consumed: int) -> int:
        epoch, position = divmod(consumed, self.samples)
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._permutation = generator.permutation(self.samples)
            self._epoch = epoch
        return int(self._permutation[position])


@dataclass(frozen=True)
class BatchSource:
    """This replica's micro-batches of every step."""

    dataset: SequenceDataset
    order: SampleOrder
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def micro_batches(self, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        """The micro-batches of the step that starts after `consumed_samples`.

        Micro-batch m of replica r holds the samples from m * (b * replicas) + r * b on, with b
        the micro-batch size, counted within the step.
        """
        stride = self.micro_batch_size * self.data_parallel_size
        for start in range(0, global_batch_size, stride):
            first = consumed_samples + start + self.data_parallel_rank * self.micro_batch_size
            numbers = range(first, first + self.micro_batch_size)
            yield collate([self.dataset[self.order[number]] for number in numbers])


@dataclass(frozen=True)
class Batches:
    """What a replica trains on and validates with."""

    train: BatchSource
    validation: list[Batch]
    """The same micro-batches in every validation."""


def validation_batches(
    dataset: SequenceDataset,
    sequences: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    multiple: int = 1,
) -> Iterator[Batch]:
    """This replica's share of the first `sequences` samples, fewer if the set is smaller.

    Whole micro-batches on every replica, so the number is rounded down to a multiple of
    micro_batch_size x replicas.

    Args:
        dataset: the validation set.
        sequences: how many to take at most.
        micro_batch_size: sequences of a micro-batch.
        data_parallel_rank: this replica.
        data_parallel_size: replicas.
        multiple: every replica's number of micro-batches must be a multiple of this; an
            interleaved schedule wants its number of stages.

    Raises:
        UserError: not one micro-batch a replica can be filled.
    """
    stride = micro_batch_size * data_parallel_size
    count = min(sequences, len(dataset)) // (stride * multiple) * (stride * multiple)
    if count == 0:
        needed = (
            f"{stride * multiple} are needed (training.micro_batch_size x replicas x {multiple})"
        )
        if len(dataset) < stride * multiple:
            raise UserError(
                f"data.validation_fraction: the validation text makes {len(dataset)} sequence(s), "
                f"and {needed}; hold out more of the text, give more, or take smaller micro-batches"
            )
        raise UserError(f"training.validation_sequences: {sequences} are too few: {needed}")
    for start in range(0, count, stride):
        first = start + data_parallel_rank * micro_batch_size
        yield collate([dataset[number] for number in range(first, first + micro_batch_size)])


def collate(sequences: list[Tensor]) -> Batch:
    """A micro-batch of sequences, each with the token that follows it [s + 1]."""
    rows = torch.stack(sequences)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones(tokens.shape),
        position_ids=torch.arange(tokens.shape[1]).repeat(len(tokens), 1),
    )


def random_batch(config: RunConfig, number: int = 0) -> Batch:
    """A micro-batch of tokens drawn at random, the same for the same seed and number."""
    shape = (config.training.micro_batch_size, config.data.seq_length)
    generator = torch.Generator().manual_seed(config.training.seed + number)
    rows = torch.randint(0, config.data.vocab_size, (2, *shape), generator=generator)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    return Batch(rows[0], rows[1], torch.ones(shape), positions)
