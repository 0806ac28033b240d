"""Pieces of tensors as files, and back at any layout.

Megatron-core's own `torch_dist` files are not used because reading them means unpickling:
`common.pt`, `.metadata` and every sharded object. Here tensors are raw bytes (`shard_file`), an
index says where each piece belongs (`places`), and the rest is JSON (`json_codec`): nothing that is
read can be code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from keel_megatron.checkpoint.manifest import DamagedError, open_shards
from keel_megatron.checkpoint.places import Place, Run, runs
from keel_megatron.checkpoint.shard_file import Part

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class NotFiniteError(Exception):
    """A tensor that is to be written holds NaN or infinity; the message is its name."""


@dataclass(frozen=True)
class Piece:
    """Part of a tensor, and where it belongs."""

    place: Place
    values: Tensor
    """`place.numel` elements, contiguous; of any shape and on any device."""


@dataclass(frozen=True)
class ToSave:
    """What a rank writes of weights and optimizer."""

    pieces: list[Piece]
    common: dict[str, Any]
    """What is not in tensors, the same on every rank (`json_codec.to_json` says of what)."""
    expected: int
    """Elements that the replicas of this rank write together; counted on the first, 0 elsewhere."""
    ready: Callable[[], None] = lambda: None
    """Returns when the pieces hold their values; from any thread."""


def parts(saved: ToSave) -> list[Part]:
    """The pieces as tensors of this rank's file; a whole block keeps its shape."""
    return [_part(piece, saved.ready) for piece in saved.pieces]


def _part(piece: Piece, ready: Callable[[], None]) -> Part:
    place = piece.place
    shape = place.block if place.is_whole else (place.numel,)

    def data() -> Any:
        ready()
        return tensor_bytes(place.name, piece.values)

    return Part(place.name, _TYPE_NAMES[piece.values.dtype], shape, data)


def _finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor in host memory.

    Raises:
        NotFiniteError: it holds NaN or infinity.
    """
    host = tensor.detach().cpu()
    # NaN makes both extremes NaN. One pass without a copy: an eighth of what the checksum takes.
    is_number = host.is_floating_point() and host.numel()
    if is_number and not all(math.isfinite(float(value)) for value in torch.aminmax(host)):
        raise NotFiniteError(name)
    return host


def tensor_bytes(name: str, tensor: Tensor) -> Any:
    """A tensor's bytes, as a file holds them.

    Raises:
        NotFiniteError: it holds NaN or infinity.
    """
    return _finite(name, tensor).contiguous().reshape(-1).view(torch.uint8).numpy()


def index(places: Iterable[tuple[str, Iterable[tuple[Place, str]]]]) -> dict[str, Any]:
    """Every tensor's type, shape and pieces, from (file, places and types in it) of all ranks."""
    tensors: dict[str, Any] = {}
    for file, found in places:
        for place, dtype in found:
            entry = tensors.setdefault(
                place.key, {"dtype": dtype, "shape": list(place.shape), "parts": []}
            )
            part = {
                "file": file,
                "name": place.name,
                "offset": list(place.offset),
                "block": list(place.block),
            }
            if not place.is_whole:
                part["range"] = [place.start, place.stop]
            entry["parts"].append(part)
    return tensors


class TensorReader(Protocol):
    """Where the masters and moments of a model are read from."""

    def fill(self, place: Place, target: Tensor, names: Sequence[str] = ()) -> None:
        """As `Reader.fill`."""


class Reader:
    """Reads the parts of a checkpoint that overlap with what a rank asks for.

    Args:
        folder: the checkpoint.
        tensors: its index.
    """

    def __init__(self, folder: Path, tensors: dict[str, Any]) -> None:
        self._folder = folder
        self._tensors = tensors
        self._files: dict[str, safe_open] = {}

    @torch.no_grad()
    def fill(self, place: Place, target: Tensor, names: Sequence[str] = ()) -> None:
        """Read a piece into `target`, a contiguous tensor of `place.numel` elements.

        Args:
            place: what is wanted.
            target: filled in place; on another device than the host's through memory there.
            names: what the tensor may be called; the first that exists is read. None: `place.key`.

        Raises:
            DamagedError: it is missing, or not what it should be.
        """
        flat = target.detach().view(-1)
        host = flat if flat.device.type == "cpu" else torch.empty(flat.shape, dtype=flat.dtype)
        key = next((name for name in names if name in self._tensors), place.key)
        try:
            self._fill(key, place, host)
        except (TypeError, KeyError, ValueError, IndexError, AttributeError):
            raise DamagedError(f"its index of {key} is not valid") from None
        if host is not flat:
            flat.copy_(host)

    def _fill(self, key: str, place: Place, target: Tensor) -> None:
        entry = self._tensors.get(key)
        if entry is None:
            raise DamagedError(f"it has no tensor {key}")
        wanted = (_TYPE_NAMES[target.dtype], place.shape)
        if (entry["dtype"], tuple(entry["shape"])) != wanted:
            raise DamagedError(
                f"{key} is {entry['dtype']} {entry['shape']} there, {wanted[0]} "
                f"{list(wanted[1])} here"
            )
        filled = 0
        for there, part in self._pieces(key, entry):
            shared = list(runs(there, place))
            if shared:
                _copy(self._values(part, there, entry["dtype"]), target, shared)
                filled += sum(run.numel for run in shared)
        if filled != place.numel:
            raise DamagedError(f"{key} has {filled} of {place.numel} values there")

    def _pieces(self, key: str, entry: dict[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
        shape = tuple(entry["shape"])
        for part in entry["parts"]:
            block = part.get("block")
            if block is None:  # format 1 has whole blocks only, whose shape is in their file
                block = self._held(part).get_shape()
            start, stop = part.get("range", (0, math.prod(block)))
            yield Place(key, shape, tuple(part["offset"]), tuple(block), start, stop), part

    def _values(self, part: dict[str, Any], there: Place, dtype: str) -> Tensor:
        """A piece's elements in order: a view of the mapped file."""
        held = self._held(part)
        shape = held.get_shape()
        if held.get_dtype() != dtype or math.prod(shape) != there.numel:
            raise DamagedError(f"{part['file']} has no {part['name']} as its index says")
        values: Tensor = held[tuple(slice(0, size) for size in shape)]
        return values.view(-1)

    def _held(self, part: dict[str, Any]) -> Any:
        """A file's tensor, to be sliced."""
        file, name = part["file"], part["name"]
        if file not in self._files:
            self._files[file] = open_shards(self._folder / Path(file).name, "pt")
        try:
            return self._files[file].get_slice(name)
        except SafetensorError:
            raise DamagedError(f"{file} has no {name} as its index says") from None


def copy_shared(source: Tensor, there: Place, target: Tensor, here: Place) -> None:
    """Copy what two pieces of a tensor share.

    Args:
        source: flat values of `there`.
        there: a piece.
        target: flat values of `here`, filled in place.
        here: another piece.
    """
    _copy(source, target, runs(there, here))


def _copy(source: Tensor, target: Tensor, shared: Iterable[Run]) -> None:
    for run in shared:
        _taken(target, *run.here).copy_(_taken(source, *run.there))


def _taken(flat: Tensor, start: int, extents: tuple[int, ...], slices: tuple[slice, ...]) -> Tensor:
    """A part of a box of consecutive elements."""
    return flat[start : start + math.prod(extents)].view(extents)[slices]
