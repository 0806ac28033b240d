"""Dataset folders built in tests, and what is in them."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from keel_megatron.config.data import DataConfig
from keel_megatron.corpus.build import build, identify, local
from keel_megatron.data.manifest import MANIFEST, Manifest
from keel_megatron.data.shards import TokenShard, read_held_out
from keel_megatron.data.tokenizer import open_tokenizer
from tests.corpus.files import ignore
from tests.corpus.tokenizers import prose


def built(config: DataConfig, folder: Path, workers: int = 1, say: Any = ignore) -> Manifest:
    """A dataset folder of these settings."""
    config = config.model_copy(update={"cache_dir": folder.parent / "cache"})
    manifest = build(config, identify(config, say), folder, say, local(workers))
    assert manifest is not None
    return manifest


def documents(folder: Path) -> dict[str, list[list[int]]]:
    """The tokens of all documents of a folder, by part, in order."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    found: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for source in manifest.sources:
        for shard in source.shards:
            prefix = folder / "shards" / shard.name
            tokens = TokenShard(prefix)
            held = set()
            if shard.held_out_documents:
                held = set(read_held_out(Path(f"{prefix}.npy"), len(tokens)).tolist())
            for number, length in enumerate(tokens.lengths):
                is_held = number in held or shard.part == "validation"
                part = "validation" if is_held else "train"
                found[part].append(tokens.read(number, 0, int(length)).tolist())
    return found


def texts_of(folder: Path) -> dict[str, list[str]]:
    (path,) = folder.glob("tokenizer.*")
    tokenizer = open_tokenizer(path)
    found = documents(folder)
    for tokens in found["train"] + found["validation"]:
        assert tokens.index(tokenizer.eod) == len(tokens) - 1
    return {part: [tokenizer.decode(tokens) for tokens in found[part]] for part in found}


def write_texts(folder: Path, count: int = 30) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:02}.txt").write_text(prose(400 + 37 * number, number))
    return folder


def digests(folder: Path) -> dict[str, str]:
    """The beginning of the SHA-256 of each part's tokens."""
    found = documents(folder)
    return {
        part: hashlib.sha256(np.array(list(chain(*found[part])), "<u2").tobytes()).hexdigest()[:16]
        for part in found
    }
