"""Finds ready Megatron-core tokens that a dataset uses in place."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from keel_megatron.data.manifest import Shard
from keel_megatron.data.shards import with_suffix
from keel_megatron.errors import UserError


def find_prefix(paths: Sequence[Path], source: str, shard: Shard, folder: Path) -> Path:
    """The prefix of an external shard, among the paths that the configuration gives its source.

    Args:
        paths: files, prefixes, folders or globs.
        source: name of the shard's source.
        shard: the shard; files of other sizes are not it.
        folder: the dataset folder, for messages.

    Raises:
        UserError: it is not there.
    """
    found = [prefix for path in paths for prefix in _prefixes(path) if _fits(prefix, shard)]
    if found:
        return max(found, key=lambda prefix: (prefix.name == shard.name, _same_time(prefix, shard)))
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
    elif path.suffix in (".bin", ".idx") and path.is_file():
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


def _same_time(prefix: Path, shard: Shard) -> bool:
    """Whether a prefix's tokens have the modification time of the shard's."""
    return with_suffix(prefix, "bin").stat().st_mtime_ns == shard.files["bin"].mtime_ns
