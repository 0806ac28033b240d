"""What a complete checkpoint holds, file by file, and whether it still does. No torch here.

`manifest.json` is written last, with the size and the CRC-32 of every other file. It detects
damage, not tampering: whoever can change a file can also change the manifest. A changed file cannot
execute code, because no file of a checkpoint is code or a pickle, and other files are refused.

CRC-32 is used instead of SHA-256: it misses one error in 4e9 and no burst of up to 32 bits, and is
about three times as fast, so that a rank that writes or reads gigabytes does not wait for it.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keel_megatron.config.reading import (
    LARGE,
    SMALL,
    open_regular,
    parse_json,
    read_small,
    read_small_text,
)
from keel_megatron.config.yaml_text import read_yaml
from keel_megatron.data.chat.templates import FILE as TEMPLATE

if TYPE_CHECKING:
    from safetensors import safe_open

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
STATE = "state.json"
INDEX = "index.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
"""One of them; earlier versions' checkpoints have none."""
COPIED = (*TOKENIZERS, TEMPLATE)
"""Files of the dataset that checkpoints and runs keep."""
BACKEND = "metadata.json"  # Megatron-core's own mark of a distributed checkpoint
FORMAT = 2
BACKEND_MARK = {"sharded_backend": "keel_safetensors", "sharded_backend_version": FORMAT}
WEIGHTS_ONLY = "weights_only"
"""Key of state.json: true in a checkpoint without optimizer state (`weights.write_weights`)."""
_READ_FORMATS = (1, 2)
"""1 had whole blocks only, and the weights beside their masters; programs that read no more than 1
refuse 2 by its number."""

_SHARDS = re.compile(r"^rank_([0-9]{5,9})\.safetensors$")
_STEP = re.compile(r"^step_([0-9]{8,15})$")
_BLOCK = 1 << 22
_LIMITS = {MANIFEST: 1 << 24, BACKEND: SMALL}
"""Bytes that these may have; the others LARGE."""


class DamagedError(Exception):
    """A checkpoint is not as it was written; the message names the file and what is wrong."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file."""

    bytes: int
    crc32: str
    """Eight hexadecimal digits."""


def shards_name(rank: int) -> str:
    """The file of a rank's tensors."""
    return f"rank_{rank:05d}.safetensors"


def rank_of(name: str) -> int | None:
    """The rank whose tensors a file holds; None for the files that rank 0 writes for all."""
    match = _SHARDS.match(name)
    return int(match[1]) if match else None


def write_checked(path: Path, blocks: Iterable[Any]) -> FileRecord:
    """Write a file from buffers, sync it, read it again and compare.

    What it promises: fsync has returned, and what the file system then gave back is what was
    written. On Linux the pages are dropped from this machine's cache before they are read, so a
    local file comes back from the device, a network file from its server. Below that nothing can
    be promised: the caches of a disk, a controller or a server answer for themselves. Where the
    kernel takes no such advice (macOS, tmpfs) it is the cache that is read.

    Raises:
        OSError: it cannot be written, or does not read back as it was written.
    """
    size = checksum = 0
    with path.open("wb") as stream:
        for block in blocks:
            stream.write(block)
            size += memoryview(block).nbytes
            checksum = zlib.crc32(block, checksum)
        stream.flush()
        os.fsync(stream.fileno())
        _forget(stream.fileno())
    written = FileRecord(size, f"{checksum:08x}")
    if (found := _record(path)) != written:
        raise OSError(None, f"reads back as {found}, was written as {written}", str(path))
    return written


def _forget(descriptor: int) -> None:
    """Drop a synced file's pages from the cache, as far as the system takes the advice."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_json(path: Path, content: Any) -> FileRecord:
    """Write a JSON file, as `write_checked` does."""
    return write_checked(path, [(json.dumps(content, indent=1) + "\n").encode()])


def write_manifest(folder: Path, step: int, files: dict[str, FileRecord]) -> None:
    """Complete a checkpoint's folder: nothing is written into it afterwards."""
    content = {
        "format": FORMAT,
        "step": step,
        "files": {name: asdict(record) for name, record in sorted(files.items())},
    }
    write_checked(folder / MANIFEST, [_sealed(content)])


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint whose names and sizes are as they were written.

    Raises:
        DamagedError: a file is missing, of another size, or does not belong there.
    """
    if folder.is_symlink():
        raise DamagedError("it is a link, which is not followed")
    content = read_json(folder / MANIFEST)
    try:
        if _sealed(content) != read_small(folder / MANIFEST, _LIMITS[MANIFEST]):
            raise DamagedError(f"{MANIFEST} has changed since it was written")
        known, step = content["format"] in _READ_FORMATS, content["step"]
        files = {
            str(name): FileRecord(int(entry["bytes"]), str(entry["crc32"]))
            for name, entry in content["files"].items()
        }
    except (TypeError, KeyError, ValueError, AttributeError):
        raise DamagedError(f"{MANIFEST} is not a list of files") from None
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    if not known:
        raise DamagedError(f"{MANIFEST} is of format {content['format']}, not {FORMAT} or less")
    _check_step(folder, MANIFEST, step)
    strangers = [name for name in (*files, *_names(folder)) if not _belongs(name)]
    if strangers:
        raise DamagedError(f"{strangers[0]} is not part of a checkpoint, so it is not read")
    for name in (CONFIG, STATE, INDEX, BACKEND):
        if name not in files:
            raise DamagedError(f"{MANIFEST} does not list {name}")
    for name, record in files.items():
        _check_size(folder / name, record)
    return files


def is_whole(folder: Path) -> bool:
    """Whether the names, the sizes and the step of a checkpoint are as they were written."""
    try:
        read_manifest(folder)
    except DamagedError:
        return False
    return True


def check_file(folder: Path, name: str, record: FileRecord) -> None:
    """Read a file of a checkpoint whole.

    Raises:
        DamagedError: its contents are not as they were written, or not what its name says.
    """
    path = folder / name
    try:
        found = _record(path)
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from None
    if found != record:
        raise DamagedError(f"{name} has checksum {found.crc32}, was written with {record.crc32}")
    if rank_of(name) is not None:
        open_shards(path)
    elif name == CONFIG:
        _check_yaml(path)
    elif name == STATE:
        content = read_json(path)
        _check_step(folder, STATE, content.get("step") if isinstance(content, dict) else None)
    elif name not in COPIED:
        read_json(path)


def check(folder: Path) -> None:
    """Read a whole checkpoint in this process.

    Raises:
        DamagedError: something is not as it was written.
    """
    for name, record in read_manifest(folder).items():
        check_file(folder, name, record)


def open_shards(path: Path, framework: Literal["numpy", "pt"] = "numpy") -> safe_open:
    """A rank's tensors; the header is read at once, the tensors when they are asked for.

    The library refuses a header of more than 100 MB, one that is not of the format, and tensors
    that overlap, leave gaps, or lie outside of the file.

    Args:
        path: the file.
        framework: what tensors are returned as; "pt" imports torch.

    Raises:
        DamagedError: the file is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open  # imports numpy: not for every command

    try:
        open_regular(path).close()  # the library would wait for a FIFO's writer
        return safe_open(path, framework)
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise DamagedError(f"{path.name} is not a safetensors file: {error}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DamagedError: it is missing or not JSON.
    """
    try:
        return parse_json(read_small(path, _LIMITS.get(path.name, LARGE)))
    except FileNotFoundError:
        raise DamagedError(f"{path.name} is missing") from None
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {error.strerror}") from None
    except ValueError:
        raise DamagedError(f"{path.name} is not JSON") from None


def _check_step(folder: Path, name: str, step: Any) -> None:
    """See that a checkpoint is of the step by whose name it would be used or removed."""
    named = _STEP.match(folder.name)
    if named is not None and (type(step) is not int or step != int(named[1])):
        raise DamagedError(f"{name} is of step {step!r}")


def _sealed(content: dict[str, Any]) -> bytes:
    """The manifest's text, with a checksum of its own content."""
    rest = {key: value for key, value in content.items() if key != "crc32"}
    checksum = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    return (json.dumps({**rest, "crc32": f"{checksum:08x}"}, indent=1) + "\n").encode()


def _check_yaml(path: Path) -> None:
    try:
        is_mapping = isinstance(read_yaml(read_small_text(path)), dict)
    except ValueError:
        is_mapping = False
    if not is_mapping:
        raise DamagedError(f"{path.name} is not a configuration")


def _belongs(name: str) -> bool:
    known = (MANIFEST, CONFIG, STATE, INDEX, BACKEND, *COPIED)
    return name in known or rank_of(name) is not None


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _check_size(path: Path, record: FileRecord) -> None:
    if path.is_symlink() or not path.is_file():
        raise DamagedError(f"{path.name} is missing")
    size = path.stat().st_size
    if size != record.bytes:
        raise DamagedError(f"{path.name} has {size} bytes, was written with {record.bytes}")


def _record(path: Path) -> FileRecord:
    size = checksum = 0
    with open_regular(path) as stream:
        while block := stream.read(_BLOCK):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return FileRecord(size, f"{checksum:08x}")
