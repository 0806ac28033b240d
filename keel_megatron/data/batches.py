"""Micro-batches, in an order that depends only on the seed and the samples consumed."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError

_HEAD = struct.Struct("<9sQBQQ")
"""Header of an index: magic bytes, version, token type, number of sequences and documents."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one replica.

    Tensors are [b, s] where nothing else is said, or None if the stage has no use.
    """

    tokens: Tensor | None = None
    """int64. The stage with the embedding uses them."""
    labels: Tensor | None = None
    """int64: the next token. The stage with the head uses them."""
    loss_mask: Tensor | None = None
    """fp32: 1 where the label counts; None = everywhere."""
    position_ids: Tensor | None = None
    """int64; None = from 0 on. The rotary embedding does not use them."""
    documents: Tensor | None = None
    """int32: number of the token's document within its sequence, from 0 on. None = attention is
    not restricted to documents. Every stage uses them."""
    borders: Tensor | None = None
    """int32 [documents + 1]: cumulative lengths of `documents`, sequence after sequence. Only a
    kernel on CUDA uses them; they are made on the host, which would have to wait there."""
    longest: int = 0
    """Length of the longest document, where there are `borders`."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; a copy from pinned memory is not waited for."""
        batch = self._bordered() if device.type == "cuda" else self
        return batch._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The batch in pinned memory."""
        return self._bordered()._each(Tensor.pin_memory)

    def only(self, *, tokens: bool, labels: bool) -> Batch:
        """The batch without what a stage does not use."""
        return replace(
            self,
            tokens=self.tokens if tokens else None,
            labels=self.labels if labels else None,
            loss_mask=self.loss_mask if labels else None,
        )

    def _bordered(self) -> Batch:
        """The batch with `borders` and `longest`."""
        if self.documents is None or self.borders is not None:
            return self
        first = torch.ones_like(self.documents, dtype=torch.bool)
        torch.ne(self.documents[:, 1:], self.documents[:, :-1], out=first[:, 1:])
        starts = first.flatten().nonzero().flatten()
        borders = torch.cat((starts, starts.new_tensor([first.numel()]))).int()
        return replace(self, borders=borders, longest=int(borders.diff().max()))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {
            name: change(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


class SequenceDataset:
    """One epoch of `prefix`.bin: the tokens of the shuffled documents, split into sequences.

    The order is that of Megatron-core's GPTDataset. It is computed at every start, in about a
    second per 10 million documents, so it needs no index files. Memory: 12 bytes per document and 4
    per sequence.

    Args:
        prefix: path of the indexed tokens, without .bin and .idx.
        seq_length: tokens per sequence.
        seed: the run's seed.

    Raises:
        UserError: the index does not match the tokens.
    """

    def __init__(self, prefix: Path, seq_length: int, seed: int) -> None:
        self.seq_length = seq_length
        self._indexed = _open(prefix)
        lengths = self._indexed.sequence_lengths
        random = np.random.RandomState(seed % 2**32)
        self._documents = np.arange(len(lengths), dtype=np.int32)
        random.shuffle(self._documents)
        # End of each shuffled document in the stream of all tokens.
        self._ends = np.cumsum(lengths[self._documents], dtype=np.int64)
        count = max(0, int(self._ends[-1]) - 1) // seq_length
        self._order = np.arange(count, dtype=np.uint32 if count < 2**32 - 2 else np.int64)
        random.shuffle(self._order)

    def __len__(self) -> int:
        """Number of sequences; a remainder at the end of the stream is dropped."""
        return len(self._order)

    def __getitem__(self, number: int) -> Tensor:
        """A sequence and its next token, int64 [seq_length + 1]."""
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
    """Open Megatron-core's IndexedDataset, which memory-maps both files and unpickles nothing.

    Raises:
        UserError: as in SequenceDataset.
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
    """Check the format of an index, and that all tokens that it refers to exist."""
    from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType

    with index.open("rb") as stream:
        magic, version, code, count, documents = _HEAD.unpack(stream.read(_HEAD.size))
    if (magic, version) != (_INDEX_HEADER, 1) or count == 0:
        raise ValueError("unknown header")
    if index.stat().st_size != _HEAD.size + 12 * count + 8 * documents:
        raise ValueError("wrong size")
    width, size = DType.size(DType.dtype_from_code(code)), tokens.stat().st_size
    lengths = np.fromfile(index, "<i4", count, offset=_HEAD.size).astype(np.int64)
    starts = np.fromfile(index, "<i8", count, offset=_HEAD.size + 4 * count)
    # The starts are checked separately too: their sums with the lengths may overflow.
    if lengths.min() < 1 or starts.min() < 0 or starts.max() > size:
        raise ValueError("it refers to no tokens")
    if (starts + width * lengths).max() > size or width * lengths.sum() > size:
        raise ValueError("it refers to more tokens than exist")


class SampleOrder:
    """Order of samples in a run: a new permutation every epoch.

    It does not depend on the number of steps, the batch size or the layout.

    Args:
        samples: number of samples in the dataset.
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
    """Micro-batches of this replica, step by step."""

    dataset: SequenceDataset
    order: SampleOrder
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    tokens: bool = True
    """Whether this stage uses the tokens."""
    labels: bool = True
    """Whether this stage uses the labels; with neither, nothing is read."""

    def micro_batches(self, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        """The micro-batches of the step that starts after `consumed_samples`.

        Micro-batch m of replica r holds the samples from m * (b * replicas) + r * b on, with b
        the micro-batch size, counted within the step.
        """
        stride = self.micro_batch_size * self.data_parallel_size
        for start in range(0, global_batch_size, stride):
            first = consumed_samples + start + self.data_parallel_rank * self.micro_batch_size
            numbers = range(first, first + self.micro_batch_size)
            if self.tokens or self.labels:
                batch = collate([self.dataset[self.order[number]] for number in numbers])
                yield batch.only(tokens=self.tokens, labels=self.labels)
            else:
                yield Batch()


@dataclass(frozen=True)
class Batches:
    """Training and validation batches of a replica."""

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
        sequences: maximum number of sequences.
        micro_batch_size: sequences per micro-batch.
        data_parallel_rank: this replica.
        data_parallel_size: number of replicas.
        multiple: the number of micro-batches per replica is a multiple of this; an interleaved
            schedule needs its number of stages.

    Raises:
        UserError: there are too few sequences for one micro-batch per replica.
    """
    stride = micro_batch_size * data_parallel_size
    count = min(sequences, len(dataset)) // (stride * multiple) * (stride * multiple)
    if count == 0:
        needed = (
            f"{stride * multiple} are needed (training.micro_batch_size x replicas x {multiple})"
        )
        if len(dataset) < stride * multiple:
            raise UserError(
                f"data.validation_fraction: the validation set has {len(dataset)} sequence(s), and "
                f"{needed}; use a larger fraction, more data, or smaller micro-batches"
            )
        raise UserError(f"training.validation_sequences: {sequences} is too small: {needed}")
    for start in range(0, count, stride):
        first = start + data_parallel_rank * micro_batch_size
        yield collate([dataset[number] for number in range(first, first + micro_batch_size)])


def collate(sequences: list[Tensor]) -> Batch:
    """A micro-batch of sequences, each with its next token [s + 1]."""
    rows = torch.stack(sequences)
    tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return Batch(tokens, labels)


def random_batch(config: RunConfig, number: int = 0) -> Batch:
    """A micro-batch of random tokens, determined by the seed and the number."""
    shape = (config.training.micro_batch_size, config.data.seq_length)
    generator = torch.Generator().manual_seed(config.training.seed + number)
    rows = torch.randint(0, config.data.vocab_size, (2, *shape), generator=generator)
    return Batch(rows[0], rows[1])
