"""Tokens to micro-batches, in an order that depends on the seed and the samples consumed alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keel_megatron.config.errors import UserError

if TYPE_CHECKING:
    from keel_megatron.data.tokenizer import Tokenizer


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


def build_dataset(
    prefix: Path, tokenizer: Tokenizer, seq_length: int, seed: int, cache: Path
) -> Any:
    """Megatron-core's GPTDataset over exactly one epoch of `prefix`.bin.

    In a distributed run rank 0 writes the dataset's indices under `cache` and the others read
    them: call this there first, then pass a barrier, then call it on the other ranks.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=seed % 2**32,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache / "indices"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(str(prefix), config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    return GPTDataset(indexed, str(prefix), documents, None, Split.train, config)


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

    dataset: Any
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


def validation_batches(
    dataset: Any,
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
        raise UserError(
            f"training.validation_sequences: {sequences} (the validation text has "
            f"{len(dataset)}) do not fill {multiple} micro-batch(es) on each replica: "
            f"{stride * multiple} are needed (training.micro_batch_size x replicas x {multiple})"
        )
    for start in range(0, count, stride):
        first = start + data_parallel_rank * micro_batch_size
        yield collate([dataset[number] for number in range(first, first + micro_batch_size)])


def collate(samples: list[dict[str, Tensor]]) -> Batch:
    """Stack the samples of a GPTDataset."""

    def stacked(key: str) -> Tensor:
        return torch.stack([sample[key] for sample in samples])

    return Batch(
        tokens=stacked("tokens"),
        labels=stacked("labels"),
        loss_mask=stacked("loss_mask").float(),
        position_ids=stacked("position_ids"),
    )
