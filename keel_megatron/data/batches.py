"""Micro-batches of a run's samples, and the same ones for every validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keel_megatron.config.run import RunConfig
from keel_megatron.data.samples import Samples
from keel_megatron.data.sequences import Sequence, SequenceDataset
from keel_megatron.errors import UserError


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
    sequences: Tensor | None = None
    """int64 [b]: numbers of the sequences in the run's order of samples. Every stage uses them
    where the stream is rounded stochastically (model.stream)."""

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


@dataclass(frozen=True)
class Uses:
    """What a stage uses of a batch."""

    tokens: bool = True
    labels: bool = True
    documents: bool = False
    """Attention stays within a document (data.document_masks)."""
    loss_mask: bool = False
    """The first token of a document that follows another does not count (data.eod_mask_loss)."""
    counts: bool = False
    """The dataset says of some tokens that they do not count (chat sources)."""
    sequences: bool = False
    """The numbers of the sequences (model.stream: bf16_stochastic)."""

    def collate(self, read: Callable[[bool], list[Sequence]], numbers: range) -> Batch:
        """A micro-batch.

        Args:
            read: returns the sequences; it is told whether their tokens are needed.
            numbers: of the sequences.
        """
        sequences = torch.tensor(numbers) if self.sequences else None
        wanted = self.tokens or self.labels
        if not wanted and not self.documents:
            return Batch(sequences=sequences)
        batch = collate(
            read(wanted), documents=self.documents, loss_mask=self.loss_mask, counts=self.counts
        )
        return replace(batch.only(tokens=self.tokens, labels=self.labels), sequences=sequences)


@dataclass(frozen=True)
class BatchSource:
    """Micro-batches of this replica, step by step."""

    samples: Samples
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    uses: Uses = Uses()

    def micro_batches(self, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        """The micro-batches of the step that starts after `consumed_samples`.

        Micro-batch m of replica r holds the samples from m * (b * replicas) + r * b on, with b
        the micro-batch size, counted within the step.
        """
        stride = self.micro_batch_size * self.data_parallel_size
        for start in range(0, global_batch_size, stride):
            first = consumed_samples + start + self.data_parallel_rank * self.micro_batch_size
            numbers = range(first, first + self.micro_batch_size)

            def read(tokens: bool, numbers: range = numbers) -> list[Sequence]:
                return [self.samples.read(number, tokens=tokens) for number in numbers]

            yield self.uses.collate(read, numbers)


@dataclass(frozen=True)
class ValidationSet:
    """One source's validation batches of a replica."""

    name: str
    """Of the source."""
    weight: int
    """The source's quota in the blend."""
    batches: list[Batch]
    """The same micro-batches in every validation."""


@dataclass(frozen=True)
class Batches:
    """Training and validation batches of a replica."""

    train: BatchSource
    validation: list[ValidationSet]
    """One for each source."""


def validation_batches(
    dataset: SequenceDataset,
    sequences: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    multiple: int = 1,
    uses: Uses = Uses(),
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
        uses: what the stage uses.

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
                f"data.validation_fraction: the validation set of {dataset.name} has "
                f"{len(dataset)} sequence(s), and {needed}; use a larger fraction, more data, or "
                "smaller micro-batches"
            )
        raise UserError(f"training.validation_sequences: {sequences} is too small: {needed}")
    for start in range(0, count, stride):
        first = start + data_parallel_rank * micro_batch_size
        numbers = range(first, first + micro_batch_size)

        def read(tokens: bool, numbers: range = numbers) -> list[Sequence]:
            return [dataset.read(number, tokens=tokens) for number in numbers]

        yield uses.collate(read, numbers)


def collate(
    sequences: list[Sequence],
    *,
    documents: bool = False,
    loss_mask: bool = False,
    counts: bool = False,
) -> Batch:
    """A micro-batch of sequences, each with its next token.

    Args:
        sequences: with tokens or, for a stage without use of them, without.
        documents: number the documents of each sequence.
        loss_mask: leave out labels that are the first token of the sequence's next document.
        counts: leave out labels that do not count by the dataset's loss mask.
    """
    tokens = labels = mask = None
    read = [sequence.tokens for sequence in sequences if sequence.tokens is not None]
    if read:
        rows = torch.from_numpy(np.stack(read))
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    if counts and read:
        mask = torch.from_numpy(np.stack([_counts(sequence) for sequence in sequences])).float()
    if not documents and not loss_mask:
        return Batch(tokens, labels, mask)
    numbers = torch.from_numpy(np.stack([_documents(sequence) for sequence in sequences]))
    if loss_mask:
        same = (numbers[:, 1:] == numbers[:, :-1]).float()
        mask = same if mask is None else mask * same
    return Batch(
        tokens, labels, mask, documents=numbers[:, :-1].contiguous() if documents else None
    )


def _counts(sequence: Sequence) -> NDArray[np.bool_]:
    """Bool [s]: which labels of a sequence count by the dataset's loss mask."""
    if sequence.counts is None:
        return np.ones(sum(sequence.lengths) - 1, dtype=np.bool_)
    return sequence.counts[1:]


def _documents(sequence: Sequence) -> NDArray[np.int32]:
    """int32 [s + 1]: number of each token's document."""
    return np.repeat(np.arange(len(sequence.lengths), dtype=np.int32), sequence.lengths)


def random_batch(config: RunConfig, number: int = 0) -> Batch:
    """A micro-batch of random tokens, determined by the seed and the number."""
    shape = (config.training.micro_batch_size, config.data.seq_length)
    generator = torch.Generator().manual_seed(config.training.seed + number)
    rows = torch.randint(0, config.data.vocab_size, (2, *shape), generator=generator)
    documents = None
    if config.data.document_masks:  # two documents
        halves = torch.arange(config.data.seq_length, dtype=torch.int32) >= shape[1] // 2
        documents = halves.int().expand(shape).contiguous()
    sequences = torch.arange(shape[0]) if config.model.stream == "bf16_stochastic" else None
    return Batch(rows[0], rows[1], documents=documents, sequences=sequences)
