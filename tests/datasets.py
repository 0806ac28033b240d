"""Small dataset folders of made-up tokens, written by Megatron-core's own builder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from keel_megatron.data.dataset import Source
from keel_megatron.data.manifest import MANIFEST, SHARDS, Manifest

VOCABULARY = 320
Documents = Sequence[Sequence[int]]


@cache
def tokenizer_model(vocab_size: int = VOCABULARY) -> bytes:
    """A SentencePiece model whose end of a document is token 0."""
    model = io.BytesIO()
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        eos_id=0,
        eos_piece="<eod>",
        unk_id=1,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokens(prefix: Path, documents: Documents) -> None:
    """Indexed tokens: `prefix`.bin and `prefix`.idx."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens in documents:
        builder.add_document(np.asarray(tokens, dtype=np.uint16), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def made_up(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    """Documents of 2 to `longest` tokens, each ended by token 0."""
    random = np.random.RandomState(seed)
    return [
        [*random.randint(1, VOCABULARY, size=random.randint(1, longest)).tolist(), 0]
        for _ in range(count)
    ]


def write_dataset(
    folder: Path,
    sources: Mapping[str, Sequence[Documents]],
    *,
    weights: Mapping[str, float] | None = None,
    external: Mapping[str, Path] | None = None,
    held_out: int = 10,
    vocab_size: int = VOCABULARY,
) -> Path:
    """A dataset folder.

    Args:
        folder: made.
        sources: the shards' documents, by source.
        weights: by source; None: by number of tokens.
        external: prefix of sources whose only shard is used in place.
        held_out: every so manieth document is held out for validation; 0: none.
        vocab_size: of the tokenizer.
    """
    (folder / SHARDS).mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(tokenizer_model(vocab_size))
    (folder / "sources.json").write_text("{}")
    content: dict[str, Any] = {
        "format": 3,
        "fingerprint": hashlib.sha256(repr(sources).encode()).hexdigest(),
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": hashlib.sha256(tokenizer_model(vocab_size)).hexdigest(),
            "given": False,
            "vocab_size": vocab_size,
            "eod": 0,
            "encoder": "sentencepiece",
            "lost": 0.0,
        },
        "validation_fraction": 0.1,
        "unigram_entropy": 5.0,
        "versions": {},
        "sources": [
            {
                "name": name,
                "weight": None if weights is None else float(weights[name]),
                "format": "text",
                "text_key": "text",
                "files": 1,
                "bytes": 1,
                "characters": 1,
                "sha256": "0" * 64,
                "shards": [
                    _shard(folder / SHARDS, name, number, documents, external or {}, held_out)
                    for number, documents in enumerate(shards)
                ],
            }
            for name, shards in sources.items()
        ],
    }
    manifest = Manifest.model_validate_json(json.dumps(content))
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1))
    return folder


def _shard(
    home: Path,
    source: str,
    number: int,
    documents: Documents,
    external: Mapping[str, Path],
    held_out: int,
) -> dict[str, Any]:
    """A shard's files and record."""
    prefix = external.get(source, home / f"{source}-{number:05d}")
    write_tokens(prefix, documents)
    numbers = np.empty(0, np.int64)
    if held_out:
        numbers = np.arange(number % held_out, len(documents), held_out, dtype=np.int64)
    names = home / f"{prefix.name}.npy"
    with names.open("wb") as stream:
        np.lib.format.write_array(stream, numbers)
    files = {end: prefix.with_name(f"{prefix.name}.{end}") for end in ("bin", "idx")}
    return {
        "name": prefix.name,
        "external": source in external,
        "part": "both",
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "held_out_documents": len(numbers),
        "held_out_tokens": sum(len(documents[n]) for n in numbers.tolist()),
        "files": {end: record(path) for end, path in {**files, "npy": names}.items()},
    }


def record(path: Path) -> dict[str, Any]:
    """A file's record in data.json."""
    content = path.read_bytes()
    return {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "mtime_ns": path.stat().st_mtime_ns,
    }


def documents_of(source: Source, part: str) -> list[list[int]]:
    """A source's documents of a part, read by Megatron-core."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    found = []
    for shard in source.shards:
        numbers = (
            np.lib.format.open_memmap(shard.path("npy")) if "npy" in shard.record.files else []
        )
        for number, row in enumerate(IndexedDataset(str(shard.prefix))):
            is_held_out = shard.record.part == "validation" or number in numbers
            if is_held_out == (part == "validation"):
                found.append(row.tolist())
    return found
