"""Whether the files of a dataset are those that were built.

As in git, a file is read only if its modification time is not that of its record. A copied dataset
is read once; what was found is noted in data.cache_dir, with the files' new times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from keel_megatron.config.reading import LARGE, open_regular, parse_json, read_small
from keel_megatron.data.dataset import REMEDY, Dataset, dataset_files
from keel_megatron.data.manifest import FileRecord
from keel_megatron.errors import UserError
from keel_megatron.runtime.cores import available_cores
from keel_megatron.runtime.files import write_whole
from keel_megatron.runtime.locks import locked

_BLOCK = 1 << 22


def check_files(dataset: Dataset, cache: Path, say: Callable[[str], None]) -> None:
    """Check the files whose modification times are not those of their records.

    Args:
        dataset: the dataset; the files' sizes are as recorded.
        cache: data.cache_dir, where what was found is noted.
        say: called with messages.

    Raises:
        UserError: a file was changed or cannot be read.
    """
    files = _unknown(dataset, cache)
    if not files:
        return
    with ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(_note(dataset, cache).with_suffix(".lock")))
        except OSError:  # it cannot be written: nothing is noted
            _check(files, dataset, say)
            return
        files = _unknown(dataset, cache)  # another process may have read them meanwhile
        _check(files, dataset, say)
        seen = {str(path): _state(path) for path in dataset_files(dataset)}
        with suppress(OSError):
            write_whole(_note(dataset, cache), json.dumps(seen))


def sha256(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _readable_sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(
            f"data.dataset: {path} cannot be read: {error.strerror or error}; {REMEDY}"
        ) from error


def _check(files: dict[Path, FileRecord], dataset: Dataset, say: Callable[[str], None]) -> None:
    """Read files and compare them with their records."""
    size = sum(record.bytes for record in files.values())
    if size > 1e9:
        say(f"checking {len(files)} file(s) of {dataset.folder}: {size / 1e9:.1f} GB")
    with ThreadPoolExecutor(available_cores()) as threads:
        for path, digest in zip(files, threads.map(_readable_sha256, files), strict=True):
            if digest != files[path].sha256:
                raise UserError(
                    f"data.dataset: {path} was changed since the dataset was built (its SHA-256 is "
                    f"{digest[:12]}, and was {files[path].sha256[:12]}); {REMEDY}"
                )


def _unknown(dataset: Dataset, cache: Path) -> dict[Path, FileRecord]:
    """The files whose times are neither recorded nor noted."""
    noted: Any = {}
    with suppress(OSError, ValueError):
        noted = parse_json(read_small(_note(dataset, cache), LARGE))
    noted = noted if isinstance(noted, dict) else {}
    return {
        path: record
        for path, record in dataset_files(dataset).items()
        if path.stat().st_mtime_ns != record.mtime_ns and noted.get(str(path)) != _state(path)
    }


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]


def _note(dataset: Dataset, cache: Path) -> Path:
    place = hashlib.sha256(str(dataset.folder.resolve()).encode()).hexdigest()[:8]
    return cache / f".{dataset.fingerprint[:16]}-{place}.checked.json"
