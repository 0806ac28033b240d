"""Sequences of shards are those of Megatron-core's GPTDataset over the same documents."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from keel_megatron.config import UserError
from keel_megatron.data.batches import collate
from keel_megatron.data.dataset import Part, open_dataset
from keel_megatron.data.index_files import open_sequences
from keel_megatron.data.sequences import Documents, build_index
from keel_megatron.data.shards import TokenShard, read_held_out
from tests.datasets import VOCABULARY, documents_of, made_up, write_dataset, write_tokens
from tests.settings import small_config

CONFIG = small_config(data__vocab_size=VOCABULARY)


def megatron(prefix: Path, seq_length: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Every sample of Megatron-core's own GPTDataset, one epoch, its indices kept nowhere."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(eod=0, pad=-1, vocab_size=VOCABULARY, unique_identifiers={})
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


@pytest.mark.parametrize(("seq_length", "seed"), [(32, 1), (32, 2**32 + 5), (7, 3), (1, 4)])
@pytest.mark.parametrize("longest", [9, 200], ids=["many short", "few long"])
@pytest.mark.parametrize("part", ["train", "validation"])
def test_the_sequences_are_megatron_cores(
    tmp_path: Path, longest: int, part: Part, seq_length: int, seed: int
) -> None:
    """Of the part's documents in one file, whatever shards they lie in."""
    count = 1200 // longest
    shards = [made_up(count, 1, longest), made_up(count // 3, 2, longest), made_up(7, 3, longest)]
    data = open_dataset(write_dataset(tmp_path / "set", {"web": shards}, held_out=3), CONFIG.data)
    write_tokens(tmp_path / "all", documents_of(data.sources[0], part))
    theirs = megatron(tmp_path / "all", seq_length, seed)
    ours = open_sequences(data, data.sources[0], part, seq_length, seed, tmp_path)
    assert len(ours) == len(theirs) > 0
    batch = collate([ours.read(number) for number in range(len(ours))])
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


def test_documents_of_a_part_are_those_of_the_record(tmp_path: Path) -> None:
    data = open_dataset(
        write_dataset(tmp_path, {"a": [made_up(50, 0), made_up(9, 1)], "b": [made_up(30, 2)]}),
        CONFIG.data,
    )
    for source in data.sources:
        for part in ("train", "validation"):
            documents = Documents(source, part)
            assert len(documents.numbers) == source.record.documents(part)
            assert documents.lengths().sum() == source.record.tokens(part)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_every_token_type_of_megatron_core_is_read(tmp_path: Path, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.b.bin"), dtype=dtype)
    documents = [[1, 2, 3, 0], [5, 0], [100, 7, 0]]
    for tokens in documents:
        builder.add_document(np.asarray(tokens, dtype=dtype), [len(tokens)])
    builder.finalize(str(tmp_path / "a.b.idx"))
    shard = TokenShard(tmp_path / "a.b")
    assert [shard.read(n, 0, len(row)).tolist() for n, row in enumerate(documents)] == documents
    assert shard.read(2, 1, 2).tolist() == [7, 0]
    assert shard.last_tokens().tolist() == [0, 0, 0]


@pytest.mark.parametrize("at", [8, 9, 17, 18, 26, 34, 50], ids=lambda at: f"byte {at}")
def test_an_index_that_does_not_fit_is_one_message(tmp_path: Path, at: int) -> None:
    write_tokens(tmp_path / "a", made_up(4, 0))
    index = tmp_path / "a.idx"
    content = bytearray(index.read_bytes())
    content[at : at + 8] = b"\xff\xff\xff\x7f" * 2
    index.write_bytes(content)
    with pytest.raises(UserError, match=r"data.dataset: .*a\.idx is not an index of a\.bin"):
        TokenShard(tmp_path / "a")


@pytest.mark.parametrize("numbers", [[0, 0], [2, 1], [-1], [4], [[1]], [1.0], ["a"]])
def test_a_list_of_held_out_documents_that_is_none(tmp_path: Path, numbers: list[object]) -> None:
    path = tmp_path / "a.npy"
    with path.open("wb") as stream:
        np.lib.format.write_array(stream, np.array(numbers))
    with pytest.raises(UserError, match=r"a\.npy does not list held-out documents"):
        read_held_out(path, 4)


def test_a_pickle_is_no_list_of_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.npy does not list held-out documents"):
        read_held_out(path, 4)


def test_orders_of_many_documents_keep_their_size(tmp_path: Path) -> None:
    """12 bytes a document and 4 a sequence."""
    data = open_dataset(write_dataset(tmp_path, {"a": [made_up(50, 0)]}), CONFIG.data)
    index = build_index(Documents(data.sources[0], "train"), 32, 0)
    assert [array.dtype.name for array in (index.documents, index.ends, index.order)] == [
        "int32",
        "int64",
        "uint32",
    ]
