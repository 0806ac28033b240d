"""One rank's tensors in one file of the safetensors format: plain bytes under a JSON header.

A little-endian uint64 with the header's length, the header, then the tensors
(github.com/huggingface/safetensors, "Format"); any reader of that format reads these files. They
are written here, not by its library, because they are written as a stream: without a second copy
of the state in memory, with the checksum taken on the way, and with a full disk told as such.
No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keel_megatron.config.reading import open_regular, parse_json

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Part:
    """A tensor to write."""

    name: str
    dtype: str
    """A key of ITEM_BYTES."""
    shape: tuple[int, ...]
    data: Callable[[], Any]
    """Its bytes, contiguous; called when they are written."""

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def blocks(parts: Sequence[Part], metadata: dict[str, str]) -> Iterator[Any]:
    """The file as a sequence of buffers.

    Wider types come first, so that every tensor lies at a multiple of its item size.
    """
    ordered = sorted(parts, key=lambda part: -ITEM_BYTES[part.dtype])
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for part in ordered:
        header[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [offset, offset + part.bytes],
        }
        offset += part.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(_LENGTH_BYTES, "little")
    yield text
    for part in ordered:
        yield part.data()


class ShardFile:
    """Reads such a file: the header at once, the tensors when they are asked for.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not of the format; says why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with open_regular(path) as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(_MAX_HEADER, size - _LENGTH_BYTES):
                raise ValueError("its header is longer than the file")
            header = _parse(stream.read(length))
        self._begin = _LENGTH_BYTES + length
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no mapping")
        self.metadata: dict[str, Any] = metadata
        self._entries = header
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: _offsets(*item)):
            first, last = _offsets(name, entry)
            if first != end or last - first != _declared_bytes(name, entry):
                raise ValueError(f"{name} does not lie where its shape says")
            end = last
        if end != size - self._begin:
            raise ValueError("its tensors do not fill it")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def dtype(self, name: str) -> str:
        """A tensor's type, a key of ITEM_BYTES."""
        return str(self._entries[name]["dtype"])

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._entries[name]["shape"])

    def read(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes, mapped from the file."""
        first, last = self._entries[name]["data_offsets"]
        if first == last:
            return np.empty(0, dtype=np.uint8)
        # Copy on write: torch wants memory that it could write to.
        return np.memmap(self.path, np.uint8, "c", self._begin + first, (last - first,))


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except ValueError:
        raise ValueError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    return header


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    try:
        first, last = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{name} has no offsets") from None
    if type(first) is not int or type(last) is not int or not 0 <= first <= last:
        raise ValueError(f"{name} has no valid offsets")
    return first, last


def _declared_bytes(name: str, entry: dict[str, Any]) -> int:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name} has the unknown type {dtype}")
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{name} has no valid shape")
    return math.prod(shape) * ITEM_BYTES[dtype]
