"""Muon's weights and gradients in flat buffers, and their exchange between the replicas.

Megatron-core's buffers cut through matrices at the borders of the replicas' shards. Here a region
holds the whole matrices of one replica (`layout/matrix_owners.py`), so that an all-gather and a
reduce-scatter of regions give and take whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from keel_megatron.layout.matrix_owners import OwnedStack, Regions

Key = tuple[str, int]
"""The name of a block's weight, and the block's number on the stage."""


class FlatBuffers:
    """The weights of the passes, which become views, and fp32 sums of their gradients.

    Args:
        weights: all of the stage, this rank's shards.
        regions: where they lie.
        group: the replicas.
        tensor: the tensor-parallel size.
    """

    def __init__(
        self,
        weights: Mapping[Key, nn.Parameter],
        regions: Regions,
        group: dist.ProcessGroup,
        tensor: int,
    ) -> None:
        self._group = group
        self._tensor = tensor
        self._parameters = list(weights.values())
        first = self._parameters[0]
        size = regions.length * group.size()
        self.weights = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros(size, dtype=torch.float32, device=first.device)
        own = slice(regions.length * group.rank(), regions.length * (group.rank() + 1))
        self.own_weights, self.own_gradients = self.weights[own], self.gradients[own]
        for replica, stacks in enumerate(regions.owners):
            region = slice(regions.length * replica, regions.length * (replica + 1))
            for owned in stacks:
                values = self.stack(self.weights[region], owned)
                sums = self.stack(self.gradients[region], owned)
                for number, block in enumerate(owned.blocks):
                    parameter = weights[owned.weight.name, block]
                    _move_into(parameter, values[number], sums[number])

    def stack(self, region: Tensor, owned: OwnedStack) -> Tensor:
        """The weights of several blocks in a region: a view [blocks, rows, columns]."""
        shard = owned.weight.shard(self._tensor)
        count = len(owned.blocks)
        return region[owned.start : owned.start + count * shard.numel].view(count, *shard.shape)

    def zero_gradients(self) -> None:
        """Start new sums."""
        self.gradients.zero_()
        for parameter in self._parameters:
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def reduce(self) -> None:
        """Average the sums over the replicas, each in its region; the rest has no meaning then."""
        if self._group.size() > 1:
            dist.reduce_scatter_tensor(self.own_gradients, self.gradients, group=self._group)
            self.own_gradients.div_(self._group.size())

    def gather(self) -> None:
        """Give all replicas the weights in everyone's region."""
        if self._group.size() > 1:
            dist.all_gather_into_tensor(self.weights, self.own_weights, group=self._group)


def _move_into(parameter: nn.Parameter, values: Tensor, sums: Tensor) -> None:
    """Make a parameter a view of a buffer, and have its gradients summed in another."""
    values.copy_(parameter.data)
    parameter.data = values
    parameter.main_grad = sums  # type: ignore[attr-defined]
    parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    register: Any = parameter.register_post_accumulate_grad_hook
    register(_add_gradient)


def _add_gradient(parameter: Any) -> None:
    """What Megatron-core's DDP does with a gradient that a layer has not added to its sum."""
    if not parameter.grad_added_to_main_grad:
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None
