"""Batches whose order depends on the seed and the samples consumed alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keel_megatron.config import UserError
from keel_megatron.data.batches import (
    BatchSource,
    SampleOrder,
    build_dataset,
    validation_batches,
)
from keel_megatron.data.prepare import PreparedData
from keel_megatron.data.tokenizer import Tokenizer

S = 32


@pytest.fixture(scope="module")
def dataset(prepared: PreparedData) -> Any:
    tokenizer = Tokenizer(prepared.tokenizer_path)
    return build_dataset(prepared.train_prefix, tokenizer, S, 1, prepared.folder)


def global_batch(dataset: Any, consumed: int, micro: int, replicas: int) -> torch.Tensor:
    """The step's sequences in the order of their numbers, put together from all replicas."""
    order = SampleOrder(len(dataset), seed=7)
    parts = [
        list(BatchSource(dataset, order, micro, rank, replicas).micro_batches(consumed, 16))
        for rank in range(replicas)
    ]
    return torch.cat([batch.tokens for step in zip(*parts, strict=True) for batch in step])


@pytest.mark.parametrize(("micro", "replicas"), [(1, 1), (4, 1), (2, 2), (4, 4), (1, 8)])
def test_a_step_has_the_same_sequences_at_every_layout(
    dataset: Any, micro: int, replicas: int
) -> None:
    expected = global_batch(dataset, 48, 16, 1)
    assert torch.equal(global_batch(dataset, 48, micro, replicas), expected)


def test_labels_are_the_tokens_that_follow(dataset: Any) -> None:
    (batch,) = BatchSource(dataset, SampleOrder(len(dataset), 7), 4, 0, 1).micro_batches(0, 4)
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (4, S)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert torch.equal(batch.position_ids, torch.arange(S).expand(4, S))
    assert batch.loss_mask.sum() == 4 * S


def test_an_epoch_sees_every_sample_once_and_the_next_in_another_order() -> None:
    order = SampleOrder(50, seed=3)
    epochs = [[order[50 * epoch + k] for k in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Going back, and another object, give the same.
    assert [order[k] for k in range(50)] == epochs[0]
    assert [SampleOrder(50, seed=3)[100 + k] for k in range(50)] == epochs[2]
    assert [SampleOrder(50, seed=4)[k] for k in range(50)] != epochs[0]


def test_the_end_of_an_epoch_may_lie_within_a_step(dataset: Any) -> None:
    n = len(dataset)
    expected = torch.cat([global_batch(dataset, n - 3, 1, 1)[:3], global_batch(dataset, n, 1, 1)])
    assert torch.equal(global_batch(dataset, n - 3, 4, 2), expected[:16])


def test_validation_is_the_same_set_on_any_number_of_replicas(dataset: Any) -> None:
    def sequences(micro: int, replicas: int) -> set[tuple[int, ...]]:
        return {
            tuple(row.tolist())
            for rank in range(replicas)
            for batch in validation_batches(dataset, 16, micro, rank, replicas)
            for row in batch.tokens
        }

    assert len(sequences(1, 1)) == 16
    assert sequences(1, 1) == sequences(2, 4) == sequences(4, 2)


def test_validation_may_need_a_multiple_of_micro_batches(dataset: Any) -> None:
    assert len(list(validation_batches(dataset, 14, 2, 0, 1, multiple=4))) == 4


def test_too_few_validation_sequences(dataset: Any) -> None:
    with pytest.raises(UserError, match=r"training.validation_sequences: 4 .* 8 are needed"):
        list(validation_batches(dataset, 4, 2, 0, 4))
