"""Finds ready Megatron-core tokens that a dataset uses in place."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from keel_megatron.config.data import DataConfig
from keel_megatron.data.manifest import Shard
from keel_megatron.data.shards import with_suffix
from keel_megatron.errors import UserError


def find_prefix(data: DataConfig, source: str, shard: Shard, folder: Path) -> Path:
    """The prefix of an external shard, among the paths that the configuration gives its source.

    Args:
        data: the run's data settings.
        source: name of the shard's source.
        shard: the shard; files of other sizes are not it.
        folder: the dataset folder, for messages.

    Raises:
        UserError: it is not there.
    """
    paths = [
        path
        for entry in data.sources or ()
        if entry.name == source
        or (entry.name is None and any(p.name == source for p in entry.path))
        for path in (*entry.path, *(entry.validation or ()))
    ]
    if data.sources is None:
        paths = list(data.text or ())
    elif not paths and len(data.sources) == 1:
        paths = [*data.sources[0].path, *(data.sources[0].validation or ())]
    found = [prefix for path in paths for prefix in _prefixes(path) if _fits(prefix, shard)]
    named = [prefix for prefix in found if prefix.name == shard.name]
    if named or found:
        return (named or found)[0]
    where = f"not in {', '.join(map(str, paths))}" if paths else "and no path is given"
    raise UserError(
        f"data.sources: the dataset {folder} uses {shard.name}.bin and .idx of source {source} in "
        f"place, {where}; give their path in an entry with name: {source}"
    )


def _prefixes(path: Path) -> Iterator[Path]:
    """Prefixes that a file, a prefix, a folder or a glob stands for."""
    if path.is_dir():
        for index in sorted(path.rglob("*.idx")):
            yield index.with_suffix("")
    elif path.suffix in (".bin", ".idx"):
        yield path.with_suffix("")
    elif with_suffix(path, "idx").is_file():
        yield path
    else:
        for name in sorted(glob.glob(str(path), recursive=True)):
            if Path(name) != path:
                yield from _prefixes(Path(name))


def _fits(prefix: Path, shard: Shard) -> bool:
    """Whether a prefix's files are as large as the shard's."""
    try:
        return all(
            with_suffix(prefix, end).stat().st_size == file.bytes
            for end, file in shard.files.items()
            if end != "npy"
        )
    except OSError:
        return False
