"""The DeepSpeed engine's state in the Megatron engine's words, and back.

Weights, masters and moments have the names and shapes that Megatron-core's distributed optimizer
gives them, so either engine goes on from the other's checkpoint. Parameters go one by one: a rank
never holds another whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor, nn

from keel_megatron.checkpoint.megatron_state import content_metadata
from keel_megatron.checkpoint.sharding import TensorReader
from keel_megatron.config.optimizer import OptimizerConfig
from keel_megatron.engines.deepspeed.zero_pieces import MASTER, MOMENTS, Zero

STATES = (MASTER, *MOMENTS)


@dataclass(frozen=True)
class _Entry:
    """A parameter and its place in the global tensor, as it was before ZeRO cut it."""

    name: str
    parameter: nn.Parameter
    shape: torch.Size
    dtype: torch.dtype
    place: Any
    """A ShardedTensor or a factory of them, without data."""


def entries(model: nn.Module) -> list[_Entry]:
    """The parameters of a model that ZeRO has not touched yet, with their places."""
    sharded: dict[str, Any] = model.sharded_state_dict(metadata=content_metadata())  # type: ignore[operator]
    places = {
        id(item.data): item
        for item in sharded.values()
        if isinstance(item, (ShardedTensor, ShardedTensorFactory))
    }
    found = []
    for name, parameter in model.named_parameters():
        place = replace(places[id(parameter)], data=None)
        found.append(_Entry(name, parameter, parameter.shape, parameter.dtype, place))
    return found


class ZeroState:
    """A `checkpoint.state.Trained`.

    Args:
        settings: the optimizer's.
        entries: the parameters with their places.
        zero: where their state is.
        group: the replicas' process group.
    """

    copies = True

    def __init__(
        self, settings: OptimizerConfig, entries: list[_Entry], zero: Zero, group: Any
    ) -> None:
        self._settings = settings
        self._entries = entries
        self._zero = zero
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def steps(self) -> int:
        """Updates that the optimizer has counted."""
        return self._zero.steps

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """All that this rank holds of masters and moments."""
        for entry in self._entries:
            for name in STATES:
                piece = self._zero.state(entry.parameter, name)
                if piece is not None:
                    yield f"{name} {entry.name}", piece.values

    def to_save(self) -> dict[str, Any]:
        """As `Trained.to_save`; every replica keeps its share of the tensors, in host memory."""
        weights: dict[str, Any] = {}
        optimizer: dict[str, Any] = {}
        for number, entry in enumerate(self._entries):
            owner = number % self._size
            for name in STATES:
                whole = self._zero.collect(entry.parameter, entry.shape, name, owner)
                if whole is None:
                    continue
                whole = whole.cpu()
                optimizer[f"{number}.{name}"] = _optimizer_tensor(entry, whole, name)
                if name == MASTER:
                    weights[entry.name] = _with(entry.place, whole.to(entry.dtype))
        return {
            "model0": weights,
            "optimizer": {
                "optimizer": {"param_groups": self._groups()},
                "param_state_sharding_type": "fully_reshardable",
                "param_state": optimizer,
            },
        }

    def _groups(self) -> list[dict[str, Any]]:
        """The groups of Megatron-core's optimizer, as far as they say anything."""
        settings = self._settings
        return [
            {
                "wd_mult": decayed,
                "lr_mult": 1.0,
                "is_expert_parallel": False,
                "is_decoupled_lr": False,
                "betas": (settings.beta1, settings.beta2),
                "eps": settings.epsilon,
                "weight_decay": settings.weight_decay * decayed,
                "step": float(self.steps),
            }
            for decayed in (1.0, 0.0)
        ]

    def read(self, path: Path, index: dict[str, Any], common: dict[str, Any]) -> Any:
        """As `Trained.read`; this replica's pieces are filled in place."""
        reader = TensorReader(path, index)
        for entry in self._entries:
            for name in STATES:
                piece = self._zero.state(entry.parameter, name)
                if piece is None:
                    continue
                empty = torch.empty(entry.shape, dtype=torch.float32)
                whole = reader.read(_optimizer_tensor(entry, empty, name))
                self._zero.put(entry.parameter, name, whole)
        return common

    def apply(self, loaded: Any) -> None:
        """As `Trained.apply`."""
        steps = {int(group["step"]) for group in loaded["optimizer"]["optimizer"]["param_groups"]}
        self._zero.set_steps(max(steps))
        self._zero.spread_masters()


def _optimizer_tensor(entry: _Entry, whole: Tensor, name: str) -> Any:
    prefix = f"optimizer.state.{name}"
    return make_sharded_optimizer_tensor(_mine(entry.place), whole, prefix)


def _with(place: Any, whole: Tensor) -> Any:
    return replace(_mine(place), data=whole)


def _mine(place: Any) -> Any:
    """The place as replica 0's, who writes: here it is the owner."""
    *others, _replica = place.replica_id
    return replace(place, replica_id=(*others, 0))
