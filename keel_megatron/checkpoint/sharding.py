"""Megatron-core's sharded state as files, and back at any layout.

Megatron-core says which part of which global tensor a rank holds (`dist_checkpointing.mapping`).
Its own `torch_dist` files are not used because reading them means unpickling: `common.pt`,
`.metadata` and every sharded object. Here tensors are raw bytes (`shard_file`), an index says
where each part lies, and the rest is JSON (`json_codec`): nothing that is read can be code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import (
    determine_global_metadata,
    validate_sharding_integrity,
)
from safetensors import SafetensorError, safe_open

from keel_megatron.checkpoint.manifest import DamagedError, open_shards
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
class Place:
    """Where a part belongs in its global tensor."""

    key: str
    shape: tuple[int, ...]
    """Of the global tensor."""
    offset: tuple[int, ...]
    dtype: str


def split_state(
    state: dict[str, Any], *, copy: bool, validate: bool
) -> tuple[list[Part], dict[str, Place], dict[str, Any]]:
    """What this rank writes of a sharded state; collective if `validate` is set.

    Args:
        state: sharded tensors and whatever else; consumed.
        copy: take the tensors' values now, not when they are written.
        validate: have Megatron-core check that the ranks' parts fill every tensor exactly.

    Returns:
        The tensors, where each belongs, and what is not sharded.

    Raises:
        TypeError: there is a sharded object with Python state, which would have to be pickled.
    """
    sharded, common = save_preprocess(state, validate)
    parts: list[Part] = []
    places: dict[str, Place] = {}
    for item in nested_values(sharded):
        if isinstance(item, ShardedObject):
            _refuse_content(item)
        elif is_main_replica(item.replica_id):
            part, place = _part(item, copy)
            parts.append(part)
            places[part.name] = place
    return parts, places, _without_shells(common)


def _without_shells(common: dict[str, Any]) -> dict[str, Any]:
    """Without the empty lists that held sharded tensors: they do not merge with filled ones."""
    kept = {}
    for key, value in common.items():
        if isinstance(value, dict):
            value = _without_shells(value)
        if not _is_shell(value):
            kept[key] = value
    return kept


def _is_shell(value: Any) -> bool:
    return isinstance(value, (dict, list)) and (not value or all(map(_is_shell, value)))


def _refuse_content(item: Any) -> None:
    """Linear layers list an extra state for fp8, which is not kept.

    It is empty, or Transformer Engine's pickle of the recipe: scaled tensor by tensor as they are,
    products keep nothing from one step to the next.
    """
    if item.key.endswith("_extra_state"):
        return
    data = item.data
    empty = data is None or (isinstance(data, torch.Tensor) and data.numel() == 0)
    if not empty:
        raise TypeError(f"{item.key} is a Python object; only tensors are written")


def _part(item: Any, copy: bool) -> tuple[Part, Place]:
    tensor = item.data.detach()
    if copy:
        tensor = tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()
    offset = tuple(item.global_offset)
    name = f"{item.key}[{','.join(map(str, offset))}]"
    # Axes that Megatron-core puts before the tensor's own have size one.
    shape = (1,) * item.prepend_axis_num + tuple(item.local_shape)
    dtype = _TYPE_NAMES[item.dtype]
    part = Part(name, dtype, shape, lambda: _bytes(_finite(name, tensor)))
    return part, Place(item.key, tuple(item.global_shape), offset, dtype)


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory.

    Raises:
        NotFiniteError: it holds NaN or infinity.
    """
    host = tensor.cpu()
    # NaN makes both extremes NaN. One pass without a copy: an eighth of what the checksum takes.
    is_number = host.is_floating_point() and host.numel()
    if is_number and not all(math.isfinite(float(value)) for value in torch.aminmax(host)):
        raise NotFiniteError(name)
    return host


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def index(places: Iterable[tuple[str, dict[str, Place]]]) -> dict[str, Any]:
    """Every tensor's type, shape and parts, from (file, what is in it) of all ranks."""
    tensors: dict[str, Any] = {}
    for file, names in places:
        for name, place in names.items():
            entry = tensors.setdefault(
                place.key, {"dtype": place.dtype, "shape": list(place.shape), "parts": []}
            )
            entry["parts"].append({"file": file, "name": name, "offset": list(place.offset)})
    return tensors


def load_state(
    folder: Path, state: dict[str, Any], tensors: dict[str, Any], common: dict[str, Any]
) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint; collective over all ranks.

    Args:
        folder: the checkpoint.
        state: as at this layout; tensors that hold data are filled in place.
        tensors: the checkpoint's index.
        common: what of the state is not sharded.

    Raises:
        DamagedError: after all collectives, if a tensor is missing or not what it should be.
    """
    # The steps of `dist_checkpointing.load` of megatron-core 0.16.1 to 0.19, whose own way of
    # reading files changes from release to release: 0.18 has no strategy for the common state.
    reader = _Tensors(folder, tensors)
    sharded, unsharded, factories = load_preprocess(state)
    merge(common, unsharded)
    sharded, _ = extract_sharded_base(sharded)
    _, of_all_ranks = determine_global_metadata(sharded)
    validate_sharding_integrity(of_all_ranks)
    merge(common, dict_list_map_outplace(reader.value, sharded))
    return apply_factory_merges(common, factories)


class TensorReader:
    """Reads single sharded tensors of a checkpoint.

    Args:
        folder: the checkpoint.
        tensors: its index.
    """

    def __init__(self, folder: Path, tensors: dict[str, Any]) -> None:
        self._tensors = _Tensors(folder, tensors)

    def read(self, item: Any) -> torch.Tensor:
        """What the checkpoint holds of a ShardedTensor, or of a factory's, merged.

        Raises:
            DamagedError: it is missing there, or not what it should be.
        """
        if isinstance(item, ShardedTensorFactory):
            parts = dict_list_map_outplace(self._tensors.value, item.build())
            return item.merge_fn(parts)
        return self._tensors.value(item)


class _Tensors:
    """Reads the parts that overlap with what a rank asks for."""

    def __init__(self, folder: Path, tensors: dict[str, Any]) -> None:
        self._folder = folder
        self._tensors = tensors
        self._files: dict[str, safe_open] = {}

    @torch.no_grad()
    def value(self, item: Any) -> Any:
        """A sharded tensor's values, filled in place if it holds a tensor."""
        if not isinstance(item, ShardedTensor):
            return item.data
        if item.data is None:
            target = torch.empty(item.local_shape, dtype=item.dtype)
        else:
            target = item.data.detach()
        try:
            self._fill(item, target.view((1,) * item.prepend_axis_num + tuple(item.local_shape)))
        except (TypeError, KeyError, ValueError, IndexError):
            raise DamagedError(f"its index of {item.key} is not valid") from None
        return target

    def _fill(self, item: Any, target: torch.Tensor) -> None:
        """Copy into `target`, with all axes of the global tensor, every part that overlaps it."""
        entry = self._tensors.get(item.key)
        if entry is None:
            raise DamagedError(f"it has no tensor {item.key}")
        wanted = (_TYPE_NAMES[item.dtype], tuple(item.global_shape))
        if (entry["dtype"], tuple(entry["shape"])) != wanted:
            raise DamagedError(
                f"{item.key} is {entry['dtype']} {entry['shape']} there, {wanted[0]} "
                f"{list(wanted[1])} here"
            )
        filled = 0
        for part in entry["parts"]:
            held = self._held(part["file"], part["name"])
            if held is None or held.get_dtype() != entry["dtype"]:
                raise DamagedError(f"{part['file']} has no {part['name']} as its index says")
            there, here = _overlap(
                part["offset"], held.get_shape(), item.global_offset, target.shape
            )
            if there is None:
                continue
            source = held[there]  # a view of the mapped file
            target[here].copy_(source)
            filled += source.numel()
        if filled != target.numel():
            raise DamagedError(f"{item.key} has {filled} of {target.numel()} values there")

    def _held(self, file: str, name: str) -> Any:
        """A file's tensor, to be sliced; None if the file has none of that name."""
        if file not in self._files:
            self._files[file] = open_shards(self._folder / Path(file).name, "pt")
        try:
            return self._files[file].get_slice(name)
        except SafetensorError:
            return None


def _overlap(
    offset: list[int], shape: list[int], wanted: tuple[int, ...], size: torch.Size
) -> tuple[Any, Any]:
    """Slices of what two blocks of one tensor share, within each of them; None if nothing."""
    there, here = [], []
    for start, length, begin, extent in zip(offset, shape, wanted, size, strict=True):
        first, last = max(start, begin), min(start + length, begin + extent)
        if first >= last:
            return None, None
        there.append(slice(first - start, last - start))
        here.append(slice(first - begin, last - begin))
    return tuple(there), tuple(here)
