"""Muon's update of stacks of weights.

With gradient G, momentum buffer M, rate lr and matrix W, as in torch.optim.Muon:

    M <- momentum M + (1 - momentum) G
    D = momentum M + (1 - momentum) G (nesterov), or M
    W <- (1 - lr decay) W - lr factor(rows, columns) NewtonSchulz(D)

for each of the matrices that a weight fuses. Those of many blocks are orthogonalised together, in
batches of bounded temporary memory (`layout/newton_schulz.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from keel_megatron.architecture.block_weights import BlockWeight
from keel_megatron.engines.megatron.muon.orthogonalize import orthogonalize, rate_factor, split
from keel_megatron.engines.megatron.muon.shards import orthogonalize_shards
from keel_megatron.layout.newton_schulz import batch_size


@dataclass(frozen=True)
class Settings:
    """Muon's settings in one step."""

    learning_rate: float
    weight_decay: float
    momentum: float
    nesterov: bool
    ns_steps: int
    adjust_lr_fn: str
    """original or match_rms_adamw."""


@dataclass(frozen=True)
class Stack:
    """One weight of n blocks, which one rank updates."""

    weight: BlockWeight
    """Whole, under tensor parallelism too."""
    masters: Tensor
    """[n, rows, columns] of this tensor rank, contiguous; as the next two."""
    gradients: Tensor
    momenta: Tensor
    rates: Tensor
    """[n]: factor of each block's learning rate."""
    decays: Tensor
    """[n]: factor of each block's weight decay."""


@torch.no_grad()
def update(
    stacks: Sequence[Stack],
    settings: Settings,
    dtype: torch.dtype,
    tensor_group: dist.ProcessGroup | None = None,
) -> None:
    """Update masters and momenta in place; overwrites the gradients.

    Args:
        stacks: what this rank owns; the ranks of a tensor group hold shards of the same weights.
        settings: of this step.
        dtype: type of the products (`working_dtype`).
        tensor_group: the tensor group; None: weights are whole.
    """
    for stack in stacks:
        stack.momenta.lerp_(stack.gradients, 1.0 - settings.momentum)
        directions = stack.momenta
        if settings.nesterov:
            directions = stack.gradients.lerp_(stack.momenta, settings.momentum)
        decay = settings.learning_rate * settings.weight_decay * stack.rates * stack.decays
        stack.masters.mul_((1.0 - decay).view(-1, 1, 1))
        _move(stack, directions, settings, dtype, tensor_group)


def _move(
    stack: Stack,
    directions: Tensor,
    settings: Settings,
    dtype: torch.dtype,
    tensor_group: dist.ProcessGroup | None,
) -> None:
    """Subtract the orthogonalised directions [n, rows, columns] from the masters."""
    tensor = 1 if tensor_group is None else tensor_group.size()
    shard = stack.weight.shard(tensor)
    matrices = zip(split(shard, stack.masters), split(shard, directions), strict=True)
    for (rows, columns), pair in zip(stack.weight.matrices, matrices, strict=True):
        limit = batch_size(rows, columns, dtype.itemsize, tensor)
        rate = settings.learning_rate * rate_factor(rows, columns, settings.adjust_lr_fn)
        batches = (torch.split(values, limit) for values in (*pair, stack.rates))
        for masters, given, rates in zip(*batches, strict=True):
            x = given.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(1, 2)
            if tensor_group is None or tensor == 1:
                x = orthogonalize(x, settings.ns_steps)
            else:
                by_columns = stack.weight.sharded == "columns"
                orthogonalize_shards(x, settings.ns_steps, by_columns, tensor_group)
            masters.addcmul_(x.view(masters.shape), rates.view(-1, 1, 1, 1), value=-rate)
