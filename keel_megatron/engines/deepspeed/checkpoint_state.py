"""The DeepSpeed engine's state under the names of the Megatron engine's checkpoints, and back.

Weights, masters and moments have the names and shapes that Megatron-core's distributed optimizer
gives them, so either engine resumes from the other's checkpoint. Parameters are collected one at a
time: a rank never holds a second model.
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
from keel_megatron.engines.deepspeed.zero_shards import MASTER, MOMENTS, ZeroShards

STATES = (MASTER, *MOMENTS)


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter and its place in the global tensor, as it was before ZeRO sharded it."""

    name: str
    weight: nn.Parameter
    shape: torch.Size
    dtype: torch.dtype
    place: Any
    """A ShardedTensor or a factory of them, without data."""


def placed_parameters(model: nn.Module) -> list[PlacedParameter]:
    """The parameters of a model that ZeRO has not sharded yet, with their places."""
    sharded: dict[str, Any] = model.sharded_state_dict(metadata=content_metadata())  # type: ignore[operator]
    places = {
        id(item.data): item
        for item in sharded.values()
        if isinstance(item, (ShardedTensor, ShardedTensorFactory))
    }
    found = []
    for name, parameter in model.named_parameters():
        place = replace(places[id(parameter)], data=None)
        found.append(PlacedParameter(name, parameter, parameter.shape, parameter.dtype, place))
    return found


class ZeroState:
    """A `checkpoint.state.Trained`.

    Args:
        settings: the optimizer's.
        parameters: the model's, with their places.
        shards: holds their state.
        group: the data-parallel process group.
    """

    copies = True

    def __init__(
        self,
        settings: OptimizerConfig,
        parameters: list[PlacedParameter],
        shards: ZeroShards,
        group: Any,
    ) -> None:
        self._settings = settings
        self._parameters = parameters
        self._shards = shards
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def steps(self) -> int:
        """Updates that the optimizer has counted."""
        return self._shards.steps

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """All that this rank holds of masters and moments, by state and parameter."""
        for one in self._parameters:
            for name in STATES:
                shard = self._shards.state(one.weight, name)
                if shard is not None:
                    yield f"{name} {one.name}", shard.values

    def to_save(self) -> dict[str, Any]:
        """As `Trained.to_save`; every replica saves its share of the tensors, from host memory."""
        weights: dict[str, Any] = {}
        optimizer: dict[str, Any] = {}
        for number, one in enumerate(self._parameters):
            owner = number % self._size
            for name in STATES:
                whole = self._shards.collect(one.weight, one.shape, name, owner)
                if whole is None:
                    continue
                whole = whole.cpu()
                optimizer[f"{number}.{name}"] = _optimizer_tensor(one, whole, name)
                if name == MASTER:
                    weights[one.name] = _with(one.place, whole.to(one.dtype))
        return {
            "model0": weights,
            "optimizer": {
                "optimizer": {"param_groups": self._groups()},
                "param_state_sharding_type": "fully_reshardable",
                "param_state": optimizer,
            },
        }

    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups as Megatron-core's optimizer would save them."""
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
        """As `Trained.read`; this replica's shards are filled in place."""
        reader = TensorReader(path, index)
        for one in self._parameters:
            for name in STATES:
                shard = self._shards.state(one.weight, name)
                if shard is None:
                    continue
                empty = torch.empty(one.shape, dtype=torch.float32)
                whole = reader.read(_optimizer_tensor(one, empty, name))
                self._shards.put(one.weight, name, whole)
        return common

    def apply(self, loaded: Any) -> None:
        """As `Trained.apply`."""
        steps = {int(group["step"]) for group in loaded["optimizer"]["optimizer"]["param_groups"]}
        self._shards.set_steps(max(steps))
        self._shards.spread_masters()


def _optimizer_tensor(one: PlacedParameter, whole: Tensor, name: str) -> Any:
    prefix = f"optimizer.state.{name}"
    return make_sharded_optimizer_tensor(_mine(one.place), whole, prefix)


def _with(place: Any, whole: Tensor) -> Any:
    return replace(_mine(place), data=whole)


def _mine(place: Any) -> Any:
    """The place as replica 0's, who writes: here it is the owner."""
    *others, _replica = place.replica_id
    return replace(place, replica_id=(*others, 0))
