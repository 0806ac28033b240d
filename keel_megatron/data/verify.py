"""`keel data verify`: reads every file of a dataset and compares it with data.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from keel_megatron.data.dataset import Dataset, PlacedShard
from keel_megatron.data.file_checks import sha256
from keel_megatron.data.shards import TokenShard, map_mask, read_held_out
from keel_megatron.errors import UserError
from keel_megatron.runtime.cores import available_cores

_LONGEST = 1 << 30
"""Tokens of a document; a longer text is several."""
_BLOCK = 1 << 24
"""Tokens that are looked at together."""


def verify(dataset: Dataset, say: Callable[[str], None]) -> list[str]:
    """Read every file of a dataset: hashes, indexes, counts, and the range of the tokens.

    Args:
        dataset: opened without a check of its files.
        say: called with a line for each file.

    Returns:
        What is wrong; empty if nothing is.
    """
    found = list(_small_files(dataset))
    shards = [(source.name, shard) for source in dataset.sources for shard in source.shards]
    with ThreadPoolExecutor(available_cores()) as threads:
        checks = threads.map(lambda one: list(_shard(dataset, one[1])), shards)
        for (source, shard), problems in zip(shards, checks, strict=True):
            record = shard.record
            ok = f"{record.documents:,} documents, {record.tokens:,} tokens"
            say(f"{source}: {shard.prefix}: {'damaged' if problems else ok}")
            found += problems
    return found


def _small_files(dataset: Dataset) -> Iterator[str]:
    """What is wrong with the tokenizer and the chat template."""
    manifest = dataset.manifest
    for path, digest in (
        (dataset.tokenizer_path, manifest.tokenizer.sha256),
        (dataset.chat_template_path, manifest.chat_template),
    ):
        if path is None:
            continue
        try:
            if path.is_symlink():
                yield f"{path} is a link, which is not followed"
            elif sha256(path) != digest:
                yield f"{path} was changed since the dataset was built"
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"


def _shard(dataset: Dataset, shard: PlacedShard) -> Iterator[str]:
    """What is wrong with a shard."""
    problems = list(_files(shard))
    yield from problems
    if problems:
        return
    try:
        tokens = TokenShard(shard.prefix)
        held_out = np.empty(0, np.int64)
        if "npy" in shard.record.files:
            held_out = read_held_out(shard.path("npy"), len(tokens))
        yield from _mask(shard, len(tokens.tokens))
    except UserError as error:
        yield str(error).removeprefix("data.dataset: ")
        return
    record, lengths = shard.record, tokens.lengths
    for name, recorded, counted in (
        ("documents", record.documents, len(tokens)),
        ("tokens", record.tokens, int(lengths.sum(dtype=np.int64))),
        ("held-out documents", record.held_out_documents, len(held_out)),
        ("held-out tokens", record.held_out_tokens, int(lengths[held_out].sum(dtype=np.int64))),
    ):
        if recorded != counted:
            yield f"{shard.prefix} has {counted:,} {name}, and {recorded:,} in data.json"
    tokenizer = dataset.manifest.tokenizer
    limit = tokenizer.vocab_size
    for start in range(0, len(tokens.tokens), _BLOCK):
        block = tokens.tokens[start : start + _BLOCK]
        if block.max() >= limit or block.min() < 0:
            yield f"{shard.path('bin')} has a token outside of the vocabulary of {limit}"
            break
    # Ready tokens need not end their documents with one.
    whole = lengths < _LONGEST
    if not record.external and (tokens.last_tokens()[whole] != tokenizer.eod).any():
        yield f"{shard.prefix} has a document without a token at its end ({tokenizer.eod})"


def _mask(shard: PlacedShard, tokens: int) -> Iterator[str]:
    """What is wrong with a shard's loss mask.

    Raises:
        UserError: it is none of these tokens.
    """
    if "mask" not in shard.record.files:
        return
    mask = map_mask(shard.path("mask"), tokens)
    if mask.max() > 1:
        yield f"{shard.path('mask')} has other values than 0 and 1"
    counted = int(mask.sum(dtype=np.int64))
    if counted != shard.record.loss_tokens:
        yield (
            f"{shard.path('mask')} has {counted:,} tokens that count in the loss, and "
            f"{shard.record.loss_tokens} in data.json"
        )


def _files(shard: PlacedShard) -> Iterator[str]:
    """What is wrong with a shard's files."""
    for path, record in shard.files.items():
        if path.parent == shard.home and path.is_symlink():
            yield f"{path} is a link, which is not followed"
            continue
        digest = None
        with suppress(OSError):
            digest = sha256(path)
        if digest is None:
            yield f"{path} is missing or cannot be read"
        elif digest != record.sha256:
            yield f"{path} was changed since the dataset was built"
