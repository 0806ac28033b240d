"""Batches whose order depends on the seed and the samples consumed alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from keel_megatron.config import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import (
    BatchSource,
    Uses,
    collate,
    random_batch,
    validation_batches,
)
from keel_megatron.data.blend import BLOCK
from keel_megatron.data.dataset import Dataset, open_dataset
from keel_megatron.data.index_files import open_sequences
from keel_megatron.data.samples import Samples
from keel_megatron.data.sequences import Sequence, SequenceDataset
from tests.datasets import VOCABULARY, made_up, write_dataset
from tests.settings import small_config

S = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cache = tmp_path_factory.mktemp("cache")
    return small_config(data__cache_dir=str(cache), data__vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def opened(config: RunConfig) -> Dataset:
    sources = {"text": [made_up(80, 0), made_up(60, 1)]}
    return open_dataset(write_dataset(config.data.cache_dir / "set", sources), config.data)


@pytest.fixture(scope="module")
def dataset(opened: Dataset, config: RunConfig) -> SequenceDataset:
    return open_sequences(opened, opened.sources[0], "train", S, 1, config.data.cache_dir)


def samples_of(dataset: SequenceDataset) -> Samples:
    return Samples([dataset], [BLOCK], 7)


def global_batch(
    dataset: SequenceDataset, consumed: int, micro: int, replicas: int
) -> torch.Tensor:
    """The step's sequences in the order of their numbers, put together from all replicas."""
    parts = [
        list(BatchSource(samples_of(dataset), micro, rank, replicas).micro_batches(consumed, 16))
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
    (batch,) = BatchSource(samples_of(dataset), 4, 0, 1).micro_batches(0, 4)
    assert batch.tokens is not None
    assert batch.labels is not None
    assert batch.tokens.shape == batch.labels.shape == (4, S)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])


@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("documents", [True, False])
def test_a_stage_gets_what_it_uses(
    dataset: SequenceDataset, tokens: bool, labels: bool, documents: bool
) -> None:
    """What every label counts, and positions from 0 on, need no tensor at all."""
    everything = Uses(documents=True, loss_mask=True)
    uses = Uses(tokens, labels, documents, loss_mask=True)
    parts = BatchSource(samples_of(dataset), 4, 0, 1, uses).micro_batches(8, 16)
    wholes = BatchSource(samples_of(dataset), 4, 0, 1, everything).micro_batches(8, 16)
    for batch, full in zip(parts, wholes, strict=True):
        for name, used in (
            ("tokens", tokens),
            ("labels", labels),
            ("loss_mask", labels),
            ("documents", documents),
        ):
            found, expected = getattr(batch, name), getattr(full, name)
            assert found is None if not used else torch.equal(found, expected), name
        assert batch.position_ids is None


@pytest.mark.parametrize("stage", [Uses(sequences=True), Uses(False, False, sequences=True)])
def test_sequences_are_numbered_over_the_run(dataset: SequenceDataset, stage: Uses) -> None:
    """On every stage, and the same at every layout."""
    for micro, replicas in ((4, 1), (1, 2)):
        found = []
        for rank in range(replicas):
            source = BatchSource(samples_of(dataset), micro, rank, replicas, stage)
            found += [batch.sequences for batch in source.micro_batches(24, 8)]
        assert sorted(torch.cat(found).tolist()) == list(range(24, 32))


def test_documents_and_the_loss_mask_follow_the_borders() -> None:
    rows = [Sequence(np.arange(7), (3, 1, 3)), Sequence(np.arange(7), (7,))]
    batch = collate(rows, documents=True, loss_mask=True)
    assert batch.documents is not None
    assert batch.loss_mask is not None
    assert batch.documents.dtype == torch.int32
    assert batch.documents.tolist() == [[0, 0, 0, 1, 2, 2], [0] * 6]
    # The labels are tokens 1 to 6; tokens 3 and 4 begin a document.
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 1, 1], [1] * 6]
    plain = collate(rows)
    assert plain.documents is plain.loss_mask is None


def test_borders_are_those_of_the_documents(dataset: SequenceDataset) -> None:
    """Every document of the set ends with token 0, and no other token is 0."""
    for number in range(len(dataset)):
        sequence = dataset.read(number)
        assert sequence.tokens is not None
        ends = np.cumsum(sequence.lengths)[:-1] - 1
        assert np.flatnonzero(sequence.tokens[:-1] == 0).tolist() == ends.tolist()
        assert dataset.read(number, tokens=False).lengths == sequence.lengths


def test_random_batches_have_documents_where_attention_is_masked() -> None:
    assert random_batch(small_config()).documents is None
    masked = small_config(data__document_masks=True)
    documents = random_batch(masked).documents
    assert documents is not None
    assert documents.shape == (2, S)
    assert documents.unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("seq_length", "seed", "digest"),
    [
        (7, 3, "cf02e281268ac493300268669c980a6e4bc6e2dafd2ba88f08d609ce182217de"),
        (32, 1, "dece80b07b3086ddb7f0ad6d6fdc19e5ed3de710f4f2447b61c62ee5bd2c0886"),
    ],
)
def test_one_source_has_the_batches_of_earlier_versions(
    tmp_path: Path, seq_length: int, seed: int, digest: str
) -> None:
    """SHA-256 of two epochs, by version 0.5's SequenceDataset and SampleOrder."""
    random = np.random.RandomState(0)
    documents = [random.randint(0, 512, size=random.randint(1, 10)) for _ in range(300)]
    sources = {"text": [documents[:120], documents[120:]]}
    config = small_config(data__vocab_size=512)
    folder = write_dataset(tmp_path, sources, held_out=0, vocab_size=512)
    opened = open_dataset(folder, config.data)
    dataset = open_sequences(opened, opened.sources[0], "train", seq_length, seed, tmp_path)
    source = BatchSource(Samples([dataset], [BLOCK], seed), 2, 0, 1)
    total = hashlib.sha256()
    for batch in source.micro_batches(0, 2 * len(dataset) + 20):
        total.update(batch.tokens.numpy().tobytes())  # type: ignore[union-attr]
        total.update(batch.labels.numpy().tobytes())  # type: ignore[union-attr]
    assert total.hexdigest() == digest


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
