"""Batches whose order depends on the seed and the samples consumed alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from keel_megatron.config import UserError
from keel_megatron.data.batches import (
    BatchSource,
    SampleOrder,
    SequenceDataset,
    collate,
    validation_batches,
)
from keel_megatron.data.prepare import PreparedData

S = 32


@pytest.fixture(scope="module")
def dataset(prepared: PreparedData) -> SequenceDataset:
    return SequenceDataset(prepared.train_prefix, S, 1)


def global_batch(
    dataset: SequenceDataset, consumed: int, micro: int, replicas: int
) -> torch.Tensor:
    """The step's sequences in the order of their numbers, put together from all replicas."""
    order = SampleOrder(len(dataset), seed=7)
    parts = [
        list(BatchSource(dataset, order, micro, rank, replicas).micro_batches(consumed, 16))
        for rank in range(replicas)
    ]
    return torch.cat([batch.tokens for step in zip(*parts, strict=True) for batch in step])


@pytest.mark.parametrize(("micro", "replicas"), [(1, 1), (4, 1), (2, 2), (4, 4), (1, 8)])
def test_a_step_has_the_same_sequences_at_every_layout(
    dataset: SequenceDataset, micro: int, replicas: int
) -> None:
    expected = global_batch(dataset, 48, 16, 1)
    assert torch.equal(global_batch(dataset, 48, micro, replicas), expected)


def test_labels_are_the_tokens_that_follow(dataset: SequenceDataset) -> None:
    (batch,) = BatchSource(dataset, SampleOrder(len(dataset), 7), 4, 0, 1).micro_batches(0, 4)
    assert batch.tokens is not None
    assert batch.labels is not None
    assert batch.tokens.shape == batch.labels.shape == (4, S)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_a_stage_gets_what_it_uses(dataset: SequenceDataset, tokens: bool, labels: bool) -> None:
    """What every label counts, and positions from 0 on, need no tensor at all."""
    whole = BatchSource(dataset, SampleOrder(len(dataset), 7), 4, 0, 1)
    part = replace(whole, tokens=tokens, labels=labels)
    for batch, full in zip(part.micro_batches(8, 16), whole.micro_batches(8, 16), strict=True):
        assert full.tokens is not None
        assert full.labels is not None
        for found, expected, used in (
            (batch.tokens, full.tokens, tokens),
            (batch.labels, full.labels, labels),
        ):
            assert found is None if not used else torch.equal(found, expected)  # type: ignore[arg-type]
        assert batch.loss_mask is batch.position_ids is None


def test_an_epoch_sees_every_sample_once_and_the_next_in_another_order() -> None:
    order = SampleOrder(50, seed=3)
    epochs = [[order[50 * epoch + k] for k in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Going back, and another object, give the same.
    assert [order[k] for k in range(50)] == epochs[0]
    assert [SampleOrder(50, seed=3)[100 + k] for k in range(50)] == epochs[2]
    assert [SampleOrder(50, seed=4)[k] for k in range(50)] != epochs[0]


def test_the_end_of_an_epoch_may_lie_within_a_step(dataset: SequenceDataset) -> None:
    n = len(dataset)
    expected = torch.cat([global_batch(dataset, n - 3, 1, 1)[:3], global_batch(dataset, n, 1, 1)])
    assert torch.equal(global_batch(dataset, n - 3, 4, 2), expected[:16])


def test_validation_is_the_same_set_on_any_number_of_replicas(dataset: SequenceDataset) -> None:
    def sequences(micro: int, replicas: int) -> set[tuple[int, ...]]:
        return {
            tuple(row.tolist())
            for rank in range(replicas)
            for batch in validation_batches(dataset, 16, micro, rank, replicas)
            for row in batch.tokens
        }

    assert len(sequences(1, 1)) == 16
    assert sequences(1, 1) == sequences(2, 4) == sequences(4, 2)


def test_validation_may_need_a_multiple_of_micro_batches(dataset: SequenceDataset) -> None:
    assert len(list(validation_batches(dataset, 14, 2, 0, 1, multiple=4))) == 4


def test_too_few_validation_sequences(dataset: SequenceDataset) -> None:
    with pytest.raises(UserError, match=r"training.validation_sequences: 4 .* 8 are needed"):
        list(validation_batches(dataset, 4, 2, 0, 4))
    few = 2 * len(dataset)
    with pytest.raises(UserError, match=rf"data.validation_fraction: .* {len(dataset)} sequence"):
        list(validation_batches(dataset, 64, few, 0, 1))


def megatron(prefix: Path, seq_length: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Every sample of Megatron-core's own GPTDataset, one epoch, its indices kept nowhere."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(eod=0, pad=-1, vocab_size=512, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=seed % 2**32,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=None,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = GPTDataset.build_low_level_dataset(str(prefix), config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(indexed), dtype=np.int32)
    theirs = GPTDataset(indexed, str(prefix), documents, None, Split.train, config)
    return [theirs[number] for number in range(len(theirs))]


def short_documents(folder: Path) -> Path:
    """Documents of 1 to 9 tokens, so that sequences span many and end with some."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "short.bin"), dtype=np.uint16)
    random = np.random.RandomState(0)
    for _ in range(300):
        tokens = random.randint(0, 512, size=random.randint(1, 10))
        builder.add_document(tokens.astype(np.uint16), [len(tokens)])
    builder.finalize(str(folder / "short.idx"))
    return folder / "short"


@pytest.mark.parametrize(("seq_length", "seed"), [(S, 1), (S, 2**32 + 5), (7, 3), (1, 4)])
@pytest.mark.parametrize("kind", ["few long documents", "many short ones"])
def test_the_sequences_are_megatron_cores(
    prepared: PreparedData, tmp_path: Path, kind: str, seq_length: int, seed: int
) -> None:
    long = kind == "few long documents"
    prefix = prepared.train_prefix if long else short_documents(tmp_path)
    if long and seq_length < S:
        prefix = prepared.validation_prefix
    theirs, ours = megatron(prefix, seq_length, seed), SequenceDataset(prefix, seq_length, seed)
    assert len(ours) == len(theirs) > 0
    batch = collate([ours[number] for number in range(len(ours))])
    everywhere = {
        "loss_mask": torch.ones(len(ours), seq_length),
        "position_ids": torch.arange(seq_length).expand(len(ours), -1),
    }
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        expected = torch.stack([sample[key] for sample in theirs])
        found = getattr(batch, key)
        found = everywhere[key] if found is None else found
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), key


def test_nothing_is_written_beside_the_tokens(prepared: PreparedData) -> None:
    """What a start would load could be half-written, or a pickle."""
    before = sorted(prepared.folder.rglob("*"))
    assert len(SequenceDataset(prepared.train_prefix, S, 1)) > 0
    assert sorted(prepared.folder.rglob("*")) == before
