"""Muon on a stage: elements of its buffers, temporary memory, and the work of an update.

Counted from `engines/megatron/muon/` and Megatron-core's order of a step: gradients are
reduce-scattered into the owners' regions, each owner updates its masters, and the weights are
all-gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from keel_megatron.architecture.block_weights import BlockWeight, block_weights
from keel_megatron.config.run import RunConfig
from keel_megatron.layout.matrix_owners import regions
from keel_megatron.layout.newton_schulz import batch_size, flops, temporary_bytes
from keel_megatron.layout.work import Work

_STATE_BYTES = 12 + 12 + 8 + 4 + 8
"""Bytes moved per element: momentum, Nesterov, decay, the norm, clipping."""
_STACK_KERNELS = 8
"""Kernels per stack: momentum, Nesterov, decay and its factors, the norm."""
_BATCH_KERNELS, _STEP_KERNELS, _EXCHANGE_KERNELS = 5, 5, 2
"""Kernels per batch: cast, norm and division, addition to the masters; per iteration three
products, two of which copy an operand first; packing for the exchange."""


_NOTHING = Work()


@dataclass(frozen=True)
class MuonLoad:
    """What Muon holds and computes on one device of a stage."""

    buffer: int = 0
    """Elements of a flat buffer of all replicas' weights or gradients, with padding."""
    own: int = 0
    """Elements of one replica's region."""
    temporary_bytes: int = 0
    """Of a batch of Newton-Schulz, at most."""
    update: Work = _NOTHING
    """Of the busiest owner."""


def muon_load(config: RunConfig, blocks: int, data_parallel: int, size: int) -> MuonLoad:
    """Muon's share of a stage; nothing under another optimizer.

    Args:
        config: the run.
        blocks: of the stage, all chunks together.
        data_parallel: number of replicas.
        size: bytes of an element in its products.
    """
    if config.optimizer.name != "muon":
        return MuonLoad()
    weights, tensor = block_weights(config.model), config.parallel.tensor
    return _load(weights, blocks, data_parallel, tensor, size, config.optimizer.ns_steps)


@cache
def _load(
    weights: tuple[BlockWeight, ...],
    blocks: int,
    replicas: int,
    tensor: int,
    size: int,
    steps: int,
) -> MuonLoad:
    placed = regions(weights, blocks, replicas, tensor)
    # Many owners have equal shares.
    shares = {tuple((one.weight, len(one.blocks)) for one in owner) for owner in placed.owners}
    temporary = [
        temporary_bytes(count, *matrix, size, tensor)
        for share in shares
        for weight, count in share
        for matrix in weight.matrices
    ]
    works = [_update(share, tensor, size, steps) for share in shares]
    busiest = max(works, key=lambda work: work.flops)
    return MuonLoad(placed.length * replicas, placed.length, max([0, *temporary]), busiest)


def _update(owned: tuple[tuple[BlockWeight, int], ...], tensor: int, size: int, steps: int) -> Work:
    """Work of an owner's update on one tensor rank.

    Args:
        owned: weights, each of so many blocks.
        tensor: the tensor-parallel size.
        size: bytes of an element in the products.
        steps: iterations.
    """
    executed = results = matmul = other = sent = 0.0
    batches = exchanges = 0
    for weight, count in owned:
        share = -(-count // tensor)
        other += _STATE_BYTES * count * weight.shard(tensor).numel
        for rows, columns in weight.matrices:
            elements, square = rows * columns, min(rows, columns) ** 2
            batches += -(-count // batch_size(rows, columns, size, tensor))
            executed += share * flops(rows, columns, steps)
            results += share * steps * (elements + 2 * square)
            # Operands and results; what baddbmm adds to is copied first.
            matmul += share * steps * size * (6 * elements + 7 * square)
            other += count * elements // tensor * (4 + 5 * size + 8)
            if tensor > 1:
                sent += 2 * size * count * elements / tensor * (tensor - 1) / tensor
                other += 2 * 2 * size * share * elements
    kernels = batches * (_BATCH_KERNELS + steps * _STEP_KERNELS) + _STACK_KERNELS * len(owned)
    if tensor > 1:
        exchanges = 2 * batches
        kernels += _EXCHANGE_KERNELS * batches
    return Work(
        flops=executed,
        products=3 * steps * batches,
        results=results,
        matmul_bytes=matmul,
        other_bytes=other,
        communication_bytes=sent,
        collectives=exchanges,
        kernels=kernels,
    )
