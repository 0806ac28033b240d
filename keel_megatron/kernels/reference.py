"""The definition of the fused operation, in plain torch and differentiated by torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    Args:
        x: [..., h], fp32 or fp64; everything is computed in its type.
        weight: [h], of any floating type.
        eps: epsilon inside the square root.
        out_dtype: type of the result, [..., h].
    """
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return y.to(out_dtype)


def scaled_add_norm(
    x: Tensor,
    f: Tensor,
    alpha: float,
    outer_weight: Tensor | None,
    inner_weight: Tensor | None,
    eps: float,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """One sub-layer's sum and norm, and the next one's inner norm.

        x' = N_out(alpha x + f),  z = N_in(x'),  N(u) = u / sqrt(mean(u^2) + eps) * weight

    (arXiv 2601.19895, section 3.) Without an outer norm x' is the sum itself; without an inner
    norm there is no z.

    Args:
        x: the residual stream [..., h], fp32 (fp64 in exactness tests).
        f: the branch's output [..., h], bf16 or x's type.
        alpha: scale of the skip path.
        outer_weight: [h], or None.
        inner_weight: [h], or None.
        eps: epsilon of both norms.
        z_dtype: type of z, the next branch's input.

    Returns:
        x' [..., h] in x's type, and z [..., h] in z_dtype or None.
    """
    x_new = torch.add(f.to(x.dtype), x, alpha=alpha)
    if outer_weight is not None:
        x_new = rms_norm(x_new, outer_weight, eps, x.dtype)
    return x_new, None if inner_weight is None else rms_norm(x_new, inner_weight, eps, z_dtype)
