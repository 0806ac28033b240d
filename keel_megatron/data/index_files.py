"""Index files: the order of a source's documents and sequences, kept in data.cache_dir/index.

A run's processes map them into memory instead of each computing them. They are made before any rank
starts, under a lock, in a folder that is renamed when it is complete; damaged ones are made again.
Where data.cache_dir cannot be written, every process computes the order in its own memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from keel_megatron.config.reading import open_regular, parse_json, read_small
from keel_megatron.data.dataset import Dataset, Part, Source
from keel_megatron.data.packing import PackedIndex, PackedSequences, build_packing
from keel_megatron.data.sequences import Documents, Index, SequenceDataset, build_index
from keel_megatron.data.shards import map_array
from keel_megatron.runtime.locks import locked

Say = Callable[[str], None]
AnyIndex = TypeVar("AnyIndex", Index, PackedIndex)

FOLDER = "index"
_VERSION = 1
_RECORD = "index.json"
_BLOCK = 1 << 22


def open_sequences(
    dataset: Dataset,
    source: Source,
    part: Part,
    seq_length: int,
    seed: int,
    cache: Path,
    say: Say = lambda _text: None,
    *,
    check: bool = False,
) -> SequenceDataset:
    """The sequences of a part of a source, with index files that are made if they are missing.

    Args:
        dataset: the dataset.
        source: one of its sources.
        part: train or validation.
        seq_length: tokens per sequence.
        seed: the run's seed.
        cache: data.cache_dir.
        say: called with messages.
        check: read existing index files in full, not only their sizes.

    Raises:
        UserError: a shard is damaged.
    """
    documents = Documents(source, part)
    folder = cache / FOLDER / _name(dataset, source, part, seq_length, seed)
    tokenizer = dataset.manifest.tokenizer
    common = (seq_length, tokenizer.vocab_size, source.name)
    if source.record.is_chat:

        def pack() -> PackedIndex:
            return build_packing(documents, seq_length, seed)

        packing = _opened(PackedIndex, pack, folder, say, check=check)
        return PackedSequences(documents, packing, *common, padding=tokenizer.eod)

    def order() -> Index:
        return build_index(documents, seq_length, seed)

    return SequenceDataset(documents, _opened(Index, order, folder, say, check=check), *common)


def _opened(
    kind: type[AnyIndex], make: Callable[[], AnyIndex], folder: Path, say: Say, *, check: bool
) -> AnyIndex:
    """An index in a folder, made if it is missing."""
    index = _read(kind, folder, check=check)
    if index is None:
        try:
            index = _made(kind, folder, make, say)
        except OSError as error:
            say(
                f"data.cache_dir: cannot write {error.filename or folder}: {error.strerror}; "
                "every process computes the order of the documents in its own memory"
            )
            index = make()
    return index


def _name(dataset: Dataset, source: Source, part: Part, seq_length: int, seed: int) -> str:
    """Name of an index: of everything that determines its content."""
    shards = [
        [
            shard.record.part,
            *(
                shard.record.files[end].sha256
                for end in ("idx", "npy")
                if end in shard.record.files
            ),
        ]
        for shard in source.of(part)
    ]
    key = json.dumps([_VERSION, shards, part, seq_length, seed])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"{dataset.fingerprint[:16]}-{source.name}-{part}-{seq_length}-{digest}"


def _made(kind: type[AnyIndex], folder: Path, make: Callable[[], AnyIndex], say: Say) -> AnyIndex:
    """Make an index's files, or wait for the process that makes them.

    Raises:
        OSError: they cannot be written.
    """
    with _locked(folder, say):
        index = _read(kind, folder, check=True)
        if index is not None:
            return index
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            say(f"{folder} is damaged: making it again")
            shutil.rmtree(folder)
        partial = folder.with_name(f"{folder.name}.partial")
        if partial.is_symlink():
            partial.unlink()
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            index = make()
            _write(partial, index)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _read(kind, folder, check=False) or index


@contextmanager
def _locked(folder: Path, say: Say) -> Iterator[None]:
    """Hold the lock of an index.

    Raises:
        OSError: there is none: the starts of other machines would write the same files.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with locked(path, lambda: say(f"waiting for another process that makes {folder}")) as has_locks:
        if not has_locks:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(path))
        yield


def _write(folder: Path, index: Index | PackedIndex) -> None:
    """Write an index's files and sync them."""
    records = {}
    for name in _arrays(type(index)):
        path = folder / f"{name}.npy"
        with path.open("wb") as stream:
            np.lib.format.write_array(stream, getattr(index, name), version=(1, 0))
            stream.flush()
            os.fsync(stream.fileno())
        records[path.name] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
    with (folder / _RECORD).open("w") as text:
        json.dump({"version": _VERSION, "files": records}, text)
        text.flush()
        os.fsync(text.fileno())


def _read(kind: type[AnyIndex], folder: Path, *, check: bool) -> AnyIndex | None:
    """An index's arrays, mapped into memory; None if they are missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if folder.is_symlink():
            return None
        record = parse_json(read_small(folder / _RECORD))
        names = _arrays(kind)
        if record["version"] != _VERSION or set(record["files"]) != {f"{n}.npy" for n in names}:
            return None
        arrays = {name: _mapped(folder, name, record, check=check) for name in names}
        index = kind(**arrays)
        if index.is_consistent():
            return index
    return None


def _arrays(kind: type[Index] | type[PackedIndex]) -> tuple[str, ...]:
    """The names of an index's arrays."""
    return tuple(field.name for field in fields(kind))


def _mapped(folder: Path, name: str, record: dict[str, Any], *, check: bool) -> Any:
    """An array of an index.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    path = folder / f"{name}.npy"
    known = record["files"][path.name]
    if path.is_symlink():
        raise ValueError("a link")
    if path.stat().st_size != known["bytes"] or (check and _checksum(path) != known["crc32"]):
        raise ValueError("changed")
    array = map_array(path)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError("no list of integers")
    return array


def _checksum(path: Path) -> str:
    """CRC-32 of a file."""
    checksum = 0
    with open_regular(path) as stream:
        while block := stream.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"
