"""The join of a branch and the residual stream: the only implementation of a rule's columns.

Eager blocks (model/layer.py) and compiled ones (model/compiled.py) differ only in the operations:
`kernels.scaled_add_norm` and `kernels.rms_norm` choose a kernel; torch compiles their definitions
in `kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from keel_megatron.architecture.residual import Inner, SubLayer
from keel_megatron.kernels import rms_norm

COLUMNS = ("alpha", "branch_factor", "branch_norm", "inner", "inner_factor", "outer_norm")
"""The columns that `join` and `branch_input` implement, with weights from `weight_of`."""

Operation = Callable[..., tuple[Tensor, Tensor | None]]
"""The fused scaled add + norms: `kernels.scaled_add_norm` or its definition."""
Norm = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
"""An RMSNorm alone: `kernels.rms_norm` or its definition."""
Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with (x, branch as it is added, x')."""


def join(
    operation: Operation,
    rule: SubLayer,
    x: Tensor,
    branch: Tensor,
    branch_weight: Tensor | None,
    outer_weight: Tensor | None,
    following: tuple[Inner, Tensor | None] | None,
    epsilon: float,
    dtype: torch.dtype,
    observer: Observer | None = None,
    norm: Norm = rms_norm,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """The stream after a sub-layer, N_out(alpha x + c N_b(F)), and the next branch's input.

    Args:
        operation: implementation of sum and norms.
        rule: the sub-layer's columns.
        x: the stream before it, [s, b, h].
        branch: F, of x's shape, in the compute type.
        branch_weight: weight [h] of N_b, or None.
        outer_weight: weight [h] of N_out, or None.
        following: what stands in front of the next branch, and its weight [h] or None; None: the
            next branch is unknown.
        epsilon: epsilon of the norms.
        dtype: type of the next branch's input.
        observer: called with the sum.
        norm: implementation of N_b.
        dropout: probability with which an element of what is added is dropped.
    """
    if rule.branch_norm:
        assert branch_weight is not None
        branch = norm(branch.to(x.dtype), branch_weight, epsilon, branch.dtype)
    if dropout:
        branch = functional.dropout(branch, dropout)
    if rule.branch_factor != 1.0:
        branch = branch * rule.branch_factor
    inner, weight = following if following is not None else ("none", None)
    x_new, z = operation(
        x, branch, rule.alpha, outer_weight, weight if inner == "norm" else None, epsilon, dtype
    )
    if observer is not None:
        observer(x, branch, x_new)
    if following is not None and inner != "norm":
        z = branch_input(inner, x_new, weight, dtype)
    return x_new, z


def branch_input(inner: Inner, x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """G(x) without a norm: a learned vector times x, or x, in the compute type."""
    if inner == "vector":
        assert weight is not None
        return (weight * x).to(dtype)
    return x.to(dtype)


def weight_of(module: Any) -> Tensor | None:
    """The weight of a norm or vector as it is applied, in the stream's type, or None.

    `inner_factor` is part of it: d N(x) is the norm with d times its weight.
    """
    if module is None or not hasattr(module, "weight"):
        return None
    weight: Tensor = getattr(module, "stream_weight", module.weight)
    return weight
