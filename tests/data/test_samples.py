"""The k-th sample of a run depends on the dataset, the weights, the seed and k alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.config import UserError
from keel_megatron.data.batches import BatchSource
from keel_megatron.data.blend import quotas
from keel_megatron.data.dataset import open_dataset
from keel_megatron.data.index_files import open_sequences
from keel_megatron.data.samples import SampleOrder, Samples
from keel_megatron.data.sequences import SequenceDataset
from tests.datasets import VOCABULARY, made_up, write_dataset
from tests.settings import small_config

SIZES = {"web": 90, "books": 40, "code": 15}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[SequenceDataset]:
    """Three sources of different sizes."""
    folder = tmp_path_factory.mktemp("data")
    config = small_config(data__vocab_size=VOCABULARY)
    documents = {name: [made_up(size, size)] for name, size in SIZES.items()}
    data = open_dataset(write_dataset(folder / "set", documents), config.data)
    return [open_sequences(data, one, "train", 32, 1, folder) for one in data.sources]


def test_an_epoch_sees_every_sample_once_and_the_next_in_another_order() -> None:
    order = SampleOrder(50, seed=3)
    epochs = [[order[50 * epoch + k] for k in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # Going back, and another object, give the same.
    assert [order[k] for k in range(50)] == epochs[0]
    assert [SampleOrder(50, seed=3)[100 + k] for k in range(50)] == epochs[2]
    assert [SampleOrder(50, seed=4)[k] for k in range(50)] != epochs[0]


def blend(sources: list[SequenceDataset], weights: tuple[float, ...], seed: int) -> Samples:
    return Samples(sources, list(quotas(dict(zip(SIZES, weights, strict=True))).values()), seed)


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(*[st.floats(0.05, 1.0)] * 3),
    st.integers(0, 2**31),
    st.integers(0, 3000),
    st.sampled_from([(1, 1, 8), (2, 1, 8), (2, 4, 8), (1, 4, 16), (4, 4, 32)]),
)
def test_batches_are_the_samples_in_order_wherever_a_run_starts_and_however_it_is_laid_out(
    sources: list[SequenceDataset],
    weights: tuple[float, ...],
    seed: int,
    first: int,
    layout: tuple[int, int, int],
) -> None:
    micro, replicas, size = layout
    straight = blend(sources, weights, seed)
    expected = [straight.read(first + k).tokens[:-1].tolist() for k in range(2 * size)]  # type: ignore[index]
    found = []
    for step in range(2):
        replica = [
            # A resume makes everything anew.
            BatchSource(blend(sources, weights, seed), micro, rank, replicas)
            for rank in range(replicas)
        ]
        batches = [list(one.micro_batches(first + step * size, size)) for one in replica]
        for parts in zip(*batches, strict=True):
            found += [row.tolist() for batch in parts for row in batch.tokens]  # type: ignore[union-attr]
    assert found == expected


def test_each_source_is_seen_in_whole_epochs_of_its_own(sources: list[SequenceDataset]) -> None:
    samples = blend(sources, (0.6, 0.3, 0.1), 5)
    places = [samples.locate(k) for k in range(2000)]
    for number, source in enumerate(sources):
        mine = [place for place in places if place.source == number]
        assert abs(len(mine) - 2000 * (0.6, 0.3, 0.1)[number]) < 1
        for epoch in range(len(mine) // len(source)):
            part = mine[epoch * len(source) : (epoch + 1) * len(source)]
            assert {place.epoch for place in part} == {epoch}
            assert sorted(place.sequence for place in part) == list(range(len(source)))


def test_where_documents_end_is_known_without_reading_tokens(
    sources: list[SequenceDataset],
) -> None:
    samples = blend(sources, (1.0, 1.0, 1.0), 0)
    for k in range(50):
        whole, borders = samples.read(k), samples.read(k, tokens=False)
        assert borders.tokens is None
        assert borders.lengths == whole.lengths
        assert sum(whole.lengths) == len(np.asarray(whole.tokens)) == 33


def test_a_token_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    config = small_config(data__vocab_size=VOCABULARY)
    documents = made_up(40, 0)
    documents[7][0] = VOCABULARY
    data = open_dataset(write_dataset(tmp_path / "set", {"web": [documents]}), config.data)
    dataset = open_sequences(data, data.sources[0], "train", 32, 1, tmp_path)
    with pytest.raises(UserError, match=r"source web has a token 320, outside of .* 320;"):
        [dataset.read(number) for number in range(len(dataset))]
