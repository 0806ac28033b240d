"""RMSNorms of query and key, and of value where the rule has it, within linear_qkv's output.

Every head is normalised by itself, with one weight for all query heads, one for the keys and one
for the values. The operation leaves the heads where they are, so split and rotation
(`model/rotary.py`) follow as without it; on CUDA one Triton kernel does all of it
(`triton_norm_rotary.py`). The statistics are in the weights' type (fp32), and each is kept for the
backward pass besides the input; the formulas are those of `fused.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from keel_megatron.kernels.fused import row_rstd

Weights = tuple[Tensor, Tensor, Tensor | None]
"""Of query, key and value, [d]; None: value is not normalised."""


def head_norms(mixed: Tensor, weights: Weights, groups: int, eps: float) -> Tensor:
    """Mixed with its heads normalised, in its type; differentiable once.

    Args:
        mixed: [s, b, groups x (queries of a group + 2) x d], Megatron-core's order.
        weights: in the stream's type.
        groups: key/value heads on this rank.
        eps: epsilon.
    """
    operation: Any = HeadNorms
    result: Tensor = operation.apply(mixed, *weights, groups, eps)
    return result


class HeadNorms(torch.autograd.Function):
    """See `head_norms`."""

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        groups: int,
        eps: float,
    ) -> Tensor:
        """See `head_norms`."""
        parts = _heads(mixed, groups, query.numel())
        gains = _gains(parts, query, key, value)
        n = len(gains)
        u = parts[..., :n, :].to(gains.dtype)
        rstd = row_rstd(u, eps)
        ctx.save_for_backward(mixed, query, key, value, rstd)
        ctx.groups = groups
        out = torch.empty_like(parts)
        out[..., :n, :] = (u * rstd).mul_(gains)
        if value is None:
            out[..., n:, :] = parts[..., n:, :]
        return out.view(mixed.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `mixed` and the weights."""
        mixed, query, key, value, rstd = ctx.saved_tensors
        parts, given = (_heads(one, ctx.groups, query.numel()) for one in (mixed, d_out))
        gains = _gains(parts, query, key, value)
        n = len(gains)
        dy = given[..., :n, :].to(gains.dtype)
        normed = parts[..., :n, :].to(gains.dtype) * rstd
        product = dy * normed
        d_gains = product.sum((0, 1, 2))
        along = product.mul_(gains).mean(-1, keepdim=True)
        du = torch.mul(dy, gains, out=product).addcmul_(normed, along, value=-1).mul_(rstd)
        d_mixed = torch.empty_like(parts)
        d_mixed[..., :n, :] = du
        if value is None:
            d_mixed[..., n:, :] = given[..., n:, :]
        shared = parts.size(3) - 2
        d_query, d_key = d_gains[:shared].sum(0), d_gains[shared]
        d_value = None if value is None else d_gains[shared + 1]
        return d_mixed.view(mixed.shape), d_query, d_key, d_value, None, None


def _heads(mixed: Tensor, groups: int, d: int) -> Tensor:
    """[s, b, groups, heads of a group, d]."""
    return mixed.reshape(*mixed.shape[:2], groups, -1, d)


def _gains(parts: Tensor, query: Tensor, key: Tensor, value: Tensor | None) -> Tensor:
    """The weight of every normalised head of a group, [heads, d]."""
    shared = parts.size(3) - 2
    rows = [query.expand(shared, -1), key[None]]
    return torch.cat(rows if value is None else [*rows, value[None]])
