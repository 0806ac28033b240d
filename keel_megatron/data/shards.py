"""Reads Megatron-core's indexed tokens: a .bin file of tokens and an .idx file of their documents.

Both files are memory-mapped and nothing in them is trusted. No torch here, so that a launching
process can read the lengths of documents.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from keel_megatron.config.reading import open_regular
from keel_megatron.errors import UserError

_MAGIC: Final = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
"""Header of an index: magic bytes, version, token type, number of sequences and documents."""
_TYPES: Final[dict[int, type]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Token types by Megatron-core's codes; 6 and 7 are floats."""


class TokenShard:
    """The documents of `prefix`.bin, of which each is a sequence of the index.

    Args:
        prefix: path of the indexed tokens, without .bin and .idx.

    Attributes:
        lengths: int32 [documents]: tokens of each document.
        tokens: all tokens of the file, in its own type.

    Raises:
        UserError: a file is missing, or the index does not match the tokens.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index, tokens = with_suffix(prefix, "idx"), with_suffix(prefix, "bin")
        try:
            code, count = _header(index)
            dtype = np.dtype(_TYPES[code]).newbyteorder("<")
            self.lengths: NDArray[np.int32] = _mapped(index, "<i4", count, _HEAD.size)
            self._starts: NDArray[np.int64] = _mapped(index, "<i8", count, _HEAD.size + 4 * count)
            with open_regular(tokens) as stream:
                size = stream.seek(0, 2)
            _check_places(self.lengths, self._starts, dtype.itemsize, size)
            self.tokens: NDArray[Any] = _mapped(tokens, dtype, size // dtype.itemsize, 0)
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise UserError(
                f"data.dataset: {index} is not an index of {tokens.name} "
                f"({getattr(error, 'strerror', None) or error}); restore that folder, or build it "
                "again: keel data build CONFIG"
            ) from error

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def read(self, document: int, offset: int, length: int) -> NDArray[Any]:
        """`length` tokens of a document from `offset` on."""
        start = self.place(document) + offset
        return self.tokens[start : start + length]

    def place(self, document: int) -> int:
        """Number of a document's first token in the file."""
        return int(self._starts[document]) // self.tokens.itemsize

    def last_tokens(self) -> NDArray[Any]:
        """The last token of every document."""
        places = self._starts // self.tokens.itemsize + self.lengths - 1
        last: NDArray[Any] = self.tokens[places]
        return last


def with_suffix(prefix: Path, suffix: str) -> Path:
    """A prefix's file; a prefix may contain dots."""
    return prefix.with_name(f"{prefix.name}.{suffix}")


def map_array(path: Path) -> NDArray[Any]:
    """The array of a .npy file, mapped into memory.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no array, or one of objects, which would be pickles.
    """
    open_regular(path).close()
    try:
        found: NDArray[Any] = np.lib.format.open_memmap(path, mode="r", max_header_size=10_000)
    except (SyntaxError, MemoryError, EOFError) as error:
        raise ValueError(str(error)) from error
    return found


def read_held_out(path: Path, documents: int) -> NDArray[np.int64]:
    """The held-out documents of a shard, int64, ascending.

    Args:
        path: a .npy file.
        documents: number of documents in the shard.

    Raises:
        UserError: the file is no such list.
    """
    try:
        found = map_array(path)
        if found.dtype != np.int64 or found.ndim != 1:
            raise ValueError("no list of integers")
        numbers = np.array(found)
        if len(numbers) and (
            numbers[0] < 0 or numbers[-1] >= documents or (np.diff(numbers) <= 0).any()
        ):
            raise ValueError(f"no ascending numbers below {documents}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.dataset: {path} does not list held-out documents ({error})"
        ) from error
    return numbers


def map_mask(path: Path, tokens: int) -> NDArray[np.uint8]:
    """A .mask file, mapped into memory: uint8 [tokens], 1 where a token counts in the loss.

    Raises:
        UserError: it cannot be read, or has not one byte for each token.
    """
    try:
        with open_regular(path) as stream:
            size = stream.seek(0, 2)
        if size != tokens:
            raise ValueError(f"{size:,} bytes for {tokens:,} tokens")
        return _mapped(path, np.uint8, tokens, 0)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.dataset: {path} is not the loss mask of its tokens "
            f"({getattr(error, 'strerror', None) or error})"
        ) from error


def _header(index: Path) -> tuple[int, int]:
    """Token type and number of sequences of an index."""
    with open_regular(index) as stream:
        magic, version, code, count, documents = _HEAD.unpack(stream.read(_HEAD.size))
        size = stream.seek(0, 2)
    if (magic, version) != (_MAGIC, 1) or count == 0:
        raise ValueError("unknown header")
    if size != _HEAD.size + 12 * count + 8 * documents:
        raise ValueError("wrong size")
    return code, count


def _mapped(path: Path, dtype: Any, count: int, offset: int) -> NDArray[Any]:
    """A part of a file as a read-only array."""
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _check_places(
    lengths: NDArray[np.int32], starts: NDArray[np.int64], width: int, size: int
) -> None:
    """Check that all tokens that an index refers to exist."""
    # The starts are checked separately too: their sums with the lengths may overflow.
    if lengths.min() < 1 or starts.min() < 0 or starts.max() > size:
        raise ValueError("it refers to no tokens")
    if (starts % width).any():
        raise ValueError("it refers to parts of tokens")
    long = lengths.astype(np.int64)
    if (starts + width * long).max() > size or width * long.sum() > size:
        raise ValueError("it refers to more tokens than exist")
