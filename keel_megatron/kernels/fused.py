"""The fused operation in torch's operators, with an explicit backward pass.

On a CPU, deep, narrow models are bound by the number of operators and by Python. Autograd of
`reference.py` takes about a fifth longer at 64 rows of 64 on two cores (`tools/bench/kernel.py`
compares them).

Source of the backward formulas: y = n g, n = u r, r = (mean(u^2) + eps)^-1/2 gives

    dg = sum over rows of dy n,   du = r (dy g - n mean(dy g n)).

Saved for the backward pass, besides the norm weights: each norm's input, h elements of x's type per
row (the sum u for the outer norm, x' for the inner one), and its statistic r, one per row. The
backward pass needs no normalised values: it is written in terms of u.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ScaledAddNorm(torch.autograd.Function):
    """kernels.reference.scaled_add_norm; the same arguments and results, differentiable once."""

    recomputable = 1
    """The output that `recompute` computes again: z."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        f: Tensor,
        alpha: float,
        outer_weight: Tensor | None,
        inner_weight: Tensor | None,
        eps: float,
        z_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """See `kernels.reference.scaled_add_norm`."""
        u = x_new = torch.add(f, x, alpha=alpha)
        outer_rstd = inner_rstd = z = None
        if outer_weight is not None:
            outer_rstd = row_rstd(u, eps)
            x_new = (u * outer_rstd).mul_(outer_weight)
        if inner_weight is not None:
            inner_rstd = row_rstd(x_new, eps)
            z = (x_new * inner_rstd).mul_(inner_weight).to(z_dtype)
        # A norm keeps its input; without one the sum itself is not needed again.
        kept = (
            None if weight is None else of
            for weight, of in ((outer_weight, u), (inner_weight, x_new))
        )
        ctx.save_for_backward(*kept, outer_weight, inner_weight, outer_rstd, inner_rstd)
        ctx.alpha, ctx.f_dtype = alpha, f.dtype
        return x_new, z

    @staticmethod
    def recompute(ctx: Any, out: Tensor) -> None:
        """Write z again, to the bit, into `out`."""
        _u, x_new, _outer_weight, inner_weight, _outer_rstd, inner_rstd = ctx.saved_tensors
        _normalised(x_new, inner_weight, inner_rstd, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_new: Tensor, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, f and the norm weights from those of x' and z."""
        u, x_new, outer_weight, inner_weight, outer_rstd, inner_rstd = ctx.saved_tensors
        d, d_outer, d_inner = dx_new, None, None
        if dz is not None and inner_weight is not None:
            d, d_inner = _norm_backward(dz.to(x_new.dtype), x_new, inner_weight, inner_rstd, dx_new)
        if outer_weight is not None:
            d, d_outer = _norm_backward(d, u, outer_weight, outer_rstd)
        dx = d if ctx.alpha == 1.0 else d * ctx.alpha
        return dx, d.to(ctx.f_dtype), None, d_outer, d_inner, None, None


class RmsNorm(torch.autograd.Function):
    """kernels.reference.rms_norm, differentiable once; x and a statistic a row are kept."""

    recomputable = 0
    """The output that `recompute` computes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        """See `kernels.reference.rms_norm`."""
        rstd = row_rstd(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight).to(out_dtype)

    @staticmethod
    def recompute(ctx: Any, out: Tensor) -> None:
        """Write the result again, to the bit, into `out`."""
        x, weight, rstd = ctx.saved_tensors
        _normalised(x, weight, rstd, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the norm weight."""
        x, weight, rstd = ctx.saved_tensors
        return *_norm_backward(dy.to(x.dtype), x, weight, rstd), None, None


def _normalised(u: Tensor, weight: Tensor, rstd: Tensor, out: Tensor) -> None:
    """Write u rstd g into `out`, by the operators of the forward passes above."""
    if out.dtype == u.dtype == weight.dtype:
        torch.mul(u, rstd, out=out).mul_(weight)
    else:
        out.copy_((u * rstd).mul_(weight))


def row_rstd(u: Tensor, eps: float) -> Tensor:
    """(mean(u^2) + eps)^-1/2 of every row: [..., 1]."""
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    if u.is_cuda:  # addcmul's kernel there refuses a scalar of the host's
        return norm.square_().mul_(1 / u.size(-1)).add_(eps).rsqrt_()
    return torch.addcmul(_scalar(eps, u.dtype), norm, norm, value=1 / u.size(-1)).rsqrt_()


@cache
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def _norm_backward(
    dy: Tensor, u: Tensor, weight: Tensor, rstd: Tensor, plus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Du (+ plus): [..., h], a new tensor, and the weight's gradient [h], from y = u rstd g.

    In terms of u, not of n = u rstd, which would be one more pass over the rows:

        dg = sum over rows of (dy u) rstd,   du = dy g rstd - u rstd^3 sum(dy u g) / h.
    """
    h = u.size(-1)
    product = (dy * u).reshape(-1, h)
    d_weight = torch.mv(product.t(), rstd.reshape(-1)).to(weight.dtype)
    along = torch.pow(rstd, 3).mul_(torch.mv(product, weight.to(u.dtype)).view_as(rstd))
    du = dy * weight
    du = du.mul_(rstd) if plus is None else torch.addcmul(plus, du, rstd)
    return du.addcmul_(u, along, value=-1 / h), d_weight
