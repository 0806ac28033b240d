"""Orthogonalisation of matrices that a tensor group shards.

The matrices are orthogonalised whole, since U V^T of a shard is not the shard of U V^T. Each rank
takes an equal number of them, so the group does the work once: it receives their shards from the
others, and sends the results back.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from keel_megatron.engines.megatron.muon.orthogonalize import orthogonalize


def orthogonalize_shards(
    shards: Tensor, steps: int, by_columns: bool, group: dist.ProcessGroup
) -> None:
    """`orthogonalize` whole matrices in place.

    Args:
        shards: [n, rows, columns] of this rank, contiguous; the same n on every rank.
        steps: iterations.
        by_columns: whether a shard is some of a matrix's columns, rather than of its rows.
        group: the ranks that hold the other shards.
    """
    n, ranks = shards.size(0), group.size()
    shares = [n // ranks + (rank < n % ranks) for rank in range(ranks)]
    whole = _receive(shards, shares, by_columns, group)
    whole = orthogonalize(whole, steps)
    _send_back(whole, shards, shares, by_columns, group)


def _receive(
    shards: Tensor, shares: list[int], by_columns: bool, group: dist.ProcessGroup
) -> Tensor:
    """This rank's share of the matrices, whole."""
    _, rows, columns = shards.shape
    ranks, own = group.size(), shares[group.rank()]
    parts = shards.new_empty(ranks, own, rows, columns)
    _exchange(parts, ranks * [own], shards, shares, group)
    if by_columns:
        return parts.permute(1, 2, 0, 3).reshape(own, rows, ranks * columns)
    return parts.transpose(0, 1).reshape(own, ranks * rows, columns)


def _send_back(
    whole: Tensor,
    shards: Tensor,
    shares: list[int],
    by_columns: bool,
    group: dist.ProcessGroup,
) -> None:
    """Fill every rank's shards from the matrices that each holds whole."""
    _, rows, columns = shards.shape
    ranks, own = group.size(), whole.size(0)
    if by_columns:
        parts = whole.view(own, rows, ranks, columns).permute(2, 0, 1, 3)
    else:
        parts = whole.view(own, ranks, rows, columns).transpose(0, 1)
    _exchange(shards, shares, parts.contiguous(), ranks * [own], group)


def _exchange(
    output: Tensor,
    received: list[int],
    given: Tensor,
    sent: list[int],
    group: dist.ProcessGroup,
) -> None:
    """All-to-all of matrices' shards: `sent` to each rank, `received` from each."""
    size = given.size(-2) * given.size(-1)
    dist.all_to_all_single(
        output.view(-1),
        given.view(-1),
        [number * size for number in received],
        [number * size for number in sent],
        group=group,
    )
