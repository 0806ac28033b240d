"""The parameters of a model under their names in a checkpoint, which no layout or engine changes.

A checkpoint has three fp32 tensors of each parameter: the master and Adam's two moments, 12 bytes a
parameter; of Muon's matrices two, the master and the momentum. The weights of the passes are not
written. They are the masters, cast: to bf16 in the update, which is the only thing that changes
either, and again on load. So a save needs no weights that are up to date on every replica, and
nothing is there twice. The tensors are called `optimizer.state.param.NAME`, `.exp_avg.` and
`.exp_avg_sq.`, as Megatron-core would name them, and `.momentum_buffer.`, as torch.optim.Muon does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor, nn

from keel_megatron.checkpoint.manifest import DamagedError
from keel_megatron.checkpoint.places import Place, cut
from keel_megatron.checkpoint.sharding import Piece, TensorReader

MASTER = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (MASTER, *MOMENTS)
"""Of a parameter of AdamW's."""
MOMENTUM = "momentum_buffer"
MUON_STATES = (MASTER, MOMENTUM)
"""Of a parameter of Muon's."""
MASTER_PREFIX = f"optimizer.state.{MASTER}."
"""Of the name of a master in a checkpoint; the parameter's own name follows."""


@dataclass(frozen=True)
class Placed:
    """A parameter of this rank, and where its elements belong."""

    name: str
    """In its chunk."""
    parameter: nn.Parameter
    blocks: tuple[Place, ...]
    """Of the global tensors, whole, one after the other as they lie in the parameter."""
    is_main: bool
    """False if another tensor or pipeline rank has the same elements, and writes them."""

    @property
    def numel(self) -> int:
        """Elements of the parameter on this rank."""
        return sum(block.numel for block in self.blocks)

    def pieces(self, state: str, values: Tensor, start: int = 0) -> list[Piece]:
        """What to write of `values`, the state's elements from `start` on in row-major order."""
        flat = values.detach().view(-1)
        return [
            Piece(_named(place, state), flat[position : position + place.numel])
            for place, position in cut(self.blocks, start, start + flat.numel())
        ]

    def read(self, reader: TensorReader, state: str, target: Tensor, start: int = 0) -> None:
        """Fill `target` with the state's elements from `start` on.

        Raises:
            DamagedError: they are missing, or not as they should be.
        """
        flat = target.detach().view(-1)
        for place, position in cut(self.blocks, start, start + flat.numel()):
            reader.fill(
                _named(place, state),
                flat[position : position + place.numel],
                master_names(place.key) if state == MASTER else (),
            )


def placed(chunk: nn.Module) -> list[Placed]:
    """The parameters of a chunk that nothing has sharded over the replicas.

    Raises:
        TypeError: the chunk holds something that these files cannot hold.
    """
    sharded: dict[str, Any] = chunk.sharded_state_dict(metadata=_metadata())  # type: ignore[operator]
    places: dict[int, Any] = {}
    for item in sharded.values():
        if isinstance(item, ShardedObject):
            _refuse_content(item)
        else:
            places[id(item.data)] = item
    found = []
    for name, parameter in chunk.named_parameters():
        item = places.pop(id(parameter))
        # (pipeline, tensor, data): the replicas along the last share the writing.
        found.append(
            Placed(name, parameter, _blocks(item, parameter), not any(item.replica_id[:-1]))
        )
    if places:
        names = [item.key for item in places.values()]
        raise TypeError(f"{names[0]} is no parameter; only parameters are written")
    return found


def updates(common: dict[str, Any]) -> int:
    """The optimizer's count of updates, from what a checkpoint holds beside its tensors.

    Raises:
        DamagedError: it has none.
    """
    try:
        saved = common["optimizer"]
        if "updates" in saved:
            return int(saved["updates"])
        # Format 1 has what Megatron-core's optimizers save: the distributed one in each group,
        # the others once, and theirs is one level deeper under bf16.
        saved = saved.get("optimizer", saved)
        if "common_step" in saved.get("state", {}):
            return int(saved["state"]["common_step"])
        return max(int(group["step"]) for group in saved["param_groups"])
    except (TypeError, KeyError, ValueError, AttributeError):
        raise DamagedError("its state has no count of the optimizer's updates") from None


def _blocks(item: ShardedTensor | ShardedTensorFactory, parameter: Tensor) -> tuple[Place, ...]:
    """The blocks that a parameter consists of: one, or a gate's and its values' of SwiGLU.

    Raises:
        TypeError: they do not follow each other in it.
    """
    tensors = item.build() if isinstance(item, ShardedTensorFactory) else [item]
    begin, found = parameter.storage_offset(), []
    for tensor in tensors:
        if not tensor.data.is_contiguous() or tensor.data.storage_offset() != begin:
            raise TypeError(f"{item.key} does not consist of consecutive blocks")
        begin += tensor.data.numel()
        # Axes that Megatron-core puts before the tensor's own have size one.
        shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
        whole = tuple(tensor.global_shape), tuple(tensor.global_offset), shape
        found.append(Place(tensor.key, *whole, 0, tensor.data.numel()))
    if begin != parameter.storage_offset() + parameter.numel():
        raise TypeError(f"{item.key} has other blocks than its parameter")
    return tuple(found)


def _named(place: Place, state: str) -> Place:
    return replace(place, key=f"optimizer.state.{state}.{place.key}")


def master_names(key: str) -> tuple[str, ...]:
    """What the master of a parameter may be called.

    In format 1 without the distributed optimizer it was `fp32_param` of a bf16 weight, and of an
    fp32 weight the weight itself.
    """
    prefix = "optimizer.state"
    return (f"{prefix}.{MASTER}.{key}", f"{prefix}.fp32_param.{key}", key)


def _metadata() -> dict[str, Any]:
    """How Megatron-core describes what a rank holds."""
    return {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


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
