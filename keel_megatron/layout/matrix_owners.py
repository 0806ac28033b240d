"""Which replica updates each of Muon's weights, and where all of them lie in flat buffers.

Muon needs a weight's whole gradient, so each weight has one owner among the replicas, which keeps
its master and momentum. A flat buffer of a stage has one region for each replica, all of one
length:

    | replica 0: linear_qkv of its blocks, linear_proj, ... | replica 1: ... | ...

One reduce-scatter then gives every owner its gradients, and one all-gather everyone the weights. A
region ends with padding, because regions are as long as the longest: with more replicas than a
stage has weights, some are nothing else.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from keel_megatron.architecture.block_weights import BlockWeight
from keel_megatron.layout.newton_schulz import flops

_ALIGNMENT = 64
"""Elements; a stack begins at a multiple of it, as Megatron-core aligns parameters."""


@dataclass(frozen=True)
class OwnedStack:
    """One weight of several blocks, which one replica owns; consecutive in its region."""

    weight: BlockWeight
    """Whole, not a tensor rank's shard."""
    blocks: tuple[int, ...]
    """Of which of the stage's blocks, counted from 0 on the stage."""
    start: int
    """Of the first in the region, elements."""


@dataclass(frozen=True)
class Regions:
    """How a stage's weights lie in the flat buffers of one tensor rank."""

    owners: tuple[tuple[OwnedStack, ...], ...]
    """Of each replica."""
    length: int
    """Elements of a region; a buffer has as many regions as there are replicas."""


def regions(weights: Sequence[BlockWeight], blocks: int, replicas: int, tensor: int = 1) -> Regions:
    """Assign the weights of a stage's blocks to the replicas, balanced by their FLOPs.

    The most expensive first, each to the replica that has least to do.

    Args:
        weights: of a block, whole.
        blocks: of the stage.
        replicas: the data-parallel size.
        tensor: the tensor-parallel size; its ranks have the same owners.
    """
    costs = [sum(flops(*matrix, steps=1) for matrix in weight.matrices) for weight in weights]
    owned: list[list[list[int]]] = [[[] for _ in weights] for _ in range(replicas)]
    least = [(0.0, replica) for replica in range(replicas)]
    for kind in sorted(range(len(weights)), key=lambda kind: -costs[kind]):
        for block in range(blocks):
            load, replica = least[0]
            owned[replica][kind].append(block)
            heapq.heapreplace(least, (load + costs[kind], replica))
    found, length = [], 0
    for kinds in owned:
        stacks, start = [], 0
        for weight, numbers in zip(weights, kinds, strict=True):
            if numbers:
                stacks.append(OwnedStack(weight, tuple(numbers), start))
                start = _aligned(start + len(numbers) * weight.shard(tensor).numel)
        found.append(tuple(stacks))
        length = max(length, start)
    return Regions(tuple(found), length)


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT
