"""Several residual streams: read as a mix, and written by a branch (hyper-connections).

n streams lie one after another along the batch: x [s, n b, h]. A sub-layer's mix is one vector of
n (n + 2) numbers: a [n], b [n] and A [n, n], row by row. With F the branch [s, b, h]

    read:   sum_j a_j x^j                        [s, b, h]
    write:  x'^k = sum_j A_jk x^j + b_k F        [s, n b, h]

(arXiv 2409.19606, equations 2 to 5, with a = A_m, A = A_r and b = B).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def streams_of(mix: Tensor) -> int:
    """n, from a mix [n (n + 2)]."""
    return math.isqrt(mix.numel() + 1) - 1


def read(x: Tensor, mix: Tensor) -> Tensor:
    """The mix of streams x [s, n b, h] that a branch reads: [s, b, h]."""
    n, (s, rows, h) = streams_of(mix), x.shape
    weights = mix[:n].to(x.dtype).view(1, 1, n).expand(s, 1, n)
    return torch.bmm(weights, x.reshape(s, n, -1)).view(s, rows // n, h)


def write(x: Tensor, branch: Tensor, mix: Tensor) -> Tensor:
    """The streams [s, n b, h] after a sub-layer, from those before it and its branch [s, b, h]."""
    written: Tensor = Write.apply(x, branch, mix)  # type: ignore[no-untyped-call]
    return written


def reference_write(x: Tensor, branch: Tensor, mix: Tensor) -> Tensor:
    """The definition of `write`, differentiated by torch."""
    n, (s, rows, h) = streams_of(mix), x.shape
    mix = mix.to(x.dtype)
    across, along = mix[2 * n :].view(n, n), mix[n : 2 * n].view(1, n, 1)
    mixed = torch.bmm(across.t().expand(s, n, n), x.reshape(s, n, -1))
    return (mixed + along * branch.to(x.dtype).reshape(s, 1, -1)).view(s, rows, h)


class Write(torch.autograd.Function):
    """`reference_write`, differentiable once; keeps x and the branch, and its result is no view.

    A pipeline stage's output must not be a view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, mix: Tensor) -> Tensor:
        """See `reference_write`."""
        n, s = streams_of(mix), x.size(0)
        ctx.save_for_backward(x, branch, mix)
        mix = mix.to(x.dtype)
        across, along = mix[2 * n :].view(n, n), mix[n : 2 * n].view(1, n, 1)
        written = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = written.view(s, n, -1)
        torch.bmm(across.t().expand(s, n, n), x.reshape(s, n, -1), out=rows)
        rows.addcmul_(along, branch.to(x.dtype).reshape(s, 1, -1))
        return written

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, the branch and the mix."""
        x, branch, mix = ctx.saved_tensors
        n, s = streams_of(mix), x.size(0)
        weights = mix.to(x.dtype)
        across, along = weights[2 * n :].view(n, n), weights[n : 2 * n].view(1, 1, n)
        d = gradient.reshape(s, n, -1)
        dx = torch.bmm(across.expand(s, n, n), d).view(x.shape)
        d_branch = torch.bmm(along.expand(s, 1, n), d).view(branch.shape).to(branch.dtype)
        rows = torch.cat((branch.to(x.dtype).reshape(s, 1, -1), x.reshape(s, n, -1)), dim=1)
        # [n + 1, n]: the gradient of b, then of A's rows; that of a is not of this sub-layer's sum.
        d_mix = torch.bmm(rows, d.transpose(1, 2)).sum(0).flatten()
        return dx, d_branch, torch.cat((d_mix.new_zeros(n), d_mix)).to(mix.dtype)
