"""Writes Megatron-core's indexed tokens: .bin and .idx files, without torch."""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

_MAGIC: Final = b"MMIDIDX\x00\x00"
_VERSION: Final = 1
_CODES: Final = {"uint16": 8, "int32": 4}
LONGEST: Final = 1 << 30
"""Tokens of the longest document; the index has 32 bits for a length, so longer ones are cut."""
_BUFFER: Final = 1 << 18


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The type of tokens, as Megatron-core chooses it: uint16 where the vocabulary fits."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class TokenWriter:
    """Writes the tokens of documents to a .bin file; a context manager that closes it.

    Args:
        path: the .bin file.
        vocab_size: size of the vocabulary.
        mask: the .mask file; None: every token counts in the loss.

    Attributes:
        lengths: tokens of each finished document.
        counts: int64 [vocab_size]: how often each token occurs among those that are counted, and
            count in the loss; complete after `close`.
        tokens_added: number of all tokens.
        loss_tokens: number of tokens that count in the loss.
        sha256: of the file's content; complete after `close`.
        mask_sha256: of the .mask file's content.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, vocab_size: int, mask: Path | None = None) -> None:
        self.lengths = array("i")
        self.counts: NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
        self.tokens_added = self.loss_tokens = 0
        self.sha256, self.mask_sha256 = hashlib.sha256(), hashlib.sha256()
        self._type = token_type(vocab_size)
        self._file = path.open("wb")
        self._mask = None if mask is None else mask.open("wb")
        self._waiting: list[NDArray[Any]] = []
        self._masks: list[NDArray[np.bool_]] = []
        self._size = 0
        self._length = 0
        self._is_counted = True

    def begin_document(self, *, counted: bool) -> None:
        """Begin a document, and say whether its tokens are counted."""
        if counted != self._is_counted:
            self._write()
            self._is_counted = counted

    def add(self, tokens: NDArray[Any]) -> None:
        """Add tokens to the current document."""
        while self._length + len(tokens) > LONGEST:
            rest = LONGEST - self._length
            self._add(tokens[:rest])
            self.end_document()
            tokens = tokens[rest:]
        self._add(tokens)

    def add_conversation(self, tokens: NDArray[Any], counts: NDArray[np.bool_]) -> None:
        """Add a document of which some tokens count in the loss; both [tokens]."""
        self._masks.append(counts)
        self.loss_tokens += int(counts.sum())
        self._add(tokens)
        self.end_document()

    def end_document(self) -> None:
        """End the current document, which has at least one token."""
        self.lengths.append(self._length)
        self._length = 0

    def close(self) -> None:
        """Write everything and close the file, safe against a crash of the machine."""
        self._write()
        for file in self._files():
            file.flush()
            os.fsync(file.fileno())
            file.close()

    def _files(self) -> list[BinaryIO]:
        return [self._file] if self._mask is None else [self._file, self._mask]

    def _add(self, tokens: NDArray[Any]) -> None:
        self._waiting.append(tokens)
        self._length += len(tokens)
        self._size += len(tokens)
        self.tokens_added += len(tokens)
        if self._size >= _BUFFER:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        tokens = np.concatenate(self._waiting)
        self._waiting, self._size = [], 0
        mask = np.concatenate(self._masks) if self._masks else None
        self._masks = []
        if self._is_counted:
            counted = tokens if mask is None else tokens[mask]
            self.counts += np.bincount(counted.astype(np.int64), minlength=len(self.counts))
        content = tokens.astype(self._type).data
        self.sha256.update(content)
        self._file.write(content)
        if mask is not None and self._mask is not None:
            content = mask.astype(np.uint8).data
            self.mask_sha256.update(content)
            self._mask.write(content)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            for file in self._files():
                file.close()


def write_index(path: Path, lengths: NDArray[np.int32], dtype: np.dtype[Any]) -> None:
    """Write an .idx file of documents that each are one sequence.

    Args:
        path: the file.
        lengths: int32 [documents]: tokens of each document.
        dtype: type of the tokens.

    Raises:
        OSError: the file cannot be written.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])[: len(lengths)]
    with path.open("wb") as file:
        file.write(_MAGIC)
        counts = (_VERSION, _CODES[dtype.name], len(lengths), len(lengths) + 1)
        file.write(struct.pack("<QBQQ", *counts))
        _write_array(file, lengths.astype("<i4"))
        _write_array(file, (starts * dtype.itemsize).astype("<i8"))
        _write_array(file, np.arange(len(lengths) + 1, dtype="<i8"))
        file.flush()
        os.fsync(file.fileno())


def join(parts: list[Path], path: Path) -> str:
    """Concatenate files into one, safe against a crash of the machine; returns its SHA-256.

    Raises:
        OSError: a file cannot be read or written.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_array(file: BinaryIO, values: NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(values).data)
