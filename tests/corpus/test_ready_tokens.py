"""Ready Megatron-core tokens are used in place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from keel_megatron.config.data import DataConfig
from keel_megatron.corpus.split import ALL, key_hash
from keel_megatron.corpus.writer import TokenWriter, token_type, write_index
from keel_megatron.data.dataset import open_dataset
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError
from tests.corpus.datasets import built
from tests.corpus.files import data
from tests.corpus.tokenizers import prose, write_sentencepiece


def write_tokens(prefix: Path, documents: list[list[int]], vocab_size: int = 400) -> None:
    with TokenWriter(Path(f"{prefix}.bin"), vocab_size) as file:
        for document in documents:
            file.add(np.array(document))
            file.end_document()
    write_index(Path(f"{prefix}.idx"), np.array(file.lengths, np.int32), token_type(vocab_size))


def write_two(folder: Path, tokenizer: Tokenizer, count: int = 100) -> list[list[int]]:
    """Two prefixes of the same name in two folders; returns the first's documents."""
    found = []
    for part in range(2):
        documents = [
            [*tokenizer.encode(prose(100 + n, 1000 * part + n)), tokenizer.eod]
            for n in range(count)
        ]
        (folder / f"part{part}").mkdir(parents=True)
        write_tokens(folder / f"part{part}" / "my text", documents)
        found.append(documents)
    return found[0]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_sentencepiece(tmp_path))


def config_of(tokenizer: Tokenizer, *sources: dict[str, object]) -> DataConfig:
    return data(
        sources=list(sources),
        tokenizer=str(tokenizer.path),
        vocab_size=400,
        validation_fraction=0.1,
    )


def test_they_are_counted_and_split_but_not_copied(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = write_two(tmp_path / "ready", tokenizer)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{n}"}) + "\n" for n in range(99))
    )
    config = config_of(
        tokenizer,
        {"path": str(tmp_path / "ready"), "name": "ready"},
        {"path": str(tmp_path / "a.jsonl"), "name": "records"},
    )
    manifest = built(config, tmp_path / "d")
    shards = manifest.sources[0].shards
    assert [shard.name for shard in shards] == ["my_text", "my_text.2"]
    assert all(shard.external for shard in shards)
    assert not list((tmp_path / "d" / "shards").glob("my_text*.bin"))
    held = np.load(tmp_path / "d" / "shards" / "my_text.npy")
    assert held.tolist() == [n for n in range(100) if key_hash(str(n)) < int(0.1 * ALL)]
    assert shards[0].held_out_tokens == sum(len(documents[n]) for n in held)
    assert shards[0].tokens == sum(map(len, documents))
    assert manifest.sources[0].documents("train") == 200 - 2 * len(held)
    opened = open_dataset(tmp_path / "d", config)
    assert opened.sources[0].shards[0].prefix.name == "my text"


def test_a_tokenizer_must_be_given(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_two(tmp_path / "ready", tokenizer, 3)
    with pytest.raises(UserError, match=r"data.tokenizer: pre-tokenized data needs the tokenizer"):
        built(data(text=str(tmp_path / "ready"), vocab_size=400), tmp_path / "d")


def test_tokens_outside_of_the_vocabulary(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tokens(tmp_path / "bad", [[1, 2, 0], [400, 0]], 500)
    config = config_of(tokenizer, {"path": str(tmp_path / "bad")})
    with pytest.raises(UserError, match=r"data.sources.0.*has the token 400, outside of the"):
        built(config, tmp_path / "d")


def test_documents_with_another_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tokens(tmp_path / "bad", [[1, 2, 3], [4, 3], [5, 0]])
    config = config_of(tokenizer, {"path": str(tmp_path / "bad")})
    with pytest.raises(UserError, match=r"only 33.3% of the documents .* end with token 0"):
        built(config, tmp_path / "d")


def test_a_single_document_needs_validation_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_tokens(tmp_path / "one", [[5, 6, 7, 0]])
    config = config_of(tokenizer, {"path": str(tmp_path / "one")})
    with pytest.raises(UserError, match=r"has only one document"):
        built(config, tmp_path / "d")
