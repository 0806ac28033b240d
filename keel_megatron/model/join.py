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
from keel_megatron.kernels import rms_norm, streams

COLUMNS = (
    "alpha",
    "branch_factor",
    "branch_norm",
    "inner",
    "inner_factor",
    "outer_norm",
    "streams",
)
"""The columns that `join` and `branch_input` implement, with weights from `weight_of`."""

Operation = Callable[..., tuple[Tensor, Tensor | None]]
"""The fused scaled add + norms: `kernels.scaled_add_norm` or its definition."""
Norm = Callable[[Tensor, Tensor, float, torch.dtype], Tensor]
"""An RMSNorm alone: `kernels.rms_norm` or its definition."""
Write = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The sums of several streams: `kernels.streams.write` or its definition."""
Front = tuple[Inner, Tensor | None, Tensor | None]
"""What is in front of a branch: G, its weight [h], and the mix of the streams that it reads."""
Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with (x, branch as it is added, x')."""


def join(
    operation: Operation,
    rule: SubLayer,
    x: Tensor,
    branch: Tensor,
    branch_weight: Tensor | None,
    outer_weight: Tensor | None,
    mix: Tensor | None,
    following: Front | None,
    epsilon: float,
    dtype: torch.dtype,
    observer: Observer | None = None,
    norm: Norm = rms_norm,
    write: Write = streams.write,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """The stream after a sub-layer, N_out(alpha x + c N_b(F)), and the next branch's input.

    Args:
        operation: implementation of sum and norms.
        rule: the sub-layer's columns.
        x: the stream before it, [s, b, h], or the streams [s, n b, h].
        branch: F, [s, b, h], in the compute type.
        branch_weight: weight [h] of N_b, or None.
        outer_weight: weight [h] of N_out, or None.
        mix: of the sub-layer's streams, or None.
        following: what is in front of the next branch; None: the next branch is unknown.
        epsilon: epsilon of the norms.
        dtype: type of the next branch's input.
        observer: called with the sum; of several streams with their mean.
        norm: implementation of N_b, and of the next N_in where there are several streams.
        write: implementation of the sums of several streams.
        dropout: probability with which an element of what is added is dropped.
    """
    if rule.branch_norm:
        assert branch_weight is not None
        branch = norm(branch.to(x.dtype), branch_weight, epsilon, branch.dtype)
    if dropout:
        branch = functional.dropout(branch, dropout)
    if rule.branch_factor != 1.0:
        branch = branch * rule.branch_factor
    if rule.streams > 1:
        assert mix is not None
        x_new = write(x, branch, mix)
        if observer is not None:
            observer(_mean(x, rule.streams), branch, _mean(x_new, rule.streams))
        return x_new, _read(x_new, following, norm, epsilon, dtype)
    inner, weight, _mix = following if following is not None else ("none", None, None)
    x_new, z = operation(
        x, branch, rule.alpha, outer_weight, weight if inner == "norm" else None, epsilon, dtype
    )
    if observer is not None:
        observer(x, branch, x_new)
    if following is not None and inner != "norm":
        z = branch_input(inner, x_new, weight, dtype)
    return x_new, z


def _read(
    x: Tensor, following: Front | None, norm: Norm, epsilon: float, dtype: torch.dtype
) -> Tensor | None:
    """The next branch's input [s, b, h] of streams [s, n b, h]."""
    if following is None:
        return None
    inner, weight, mix = following
    assert mix is not None
    read = streams.read(x, mix)
    if inner != "norm":
        return branch_input(inner, read, weight, dtype)
    assert weight is not None
    return norm(read, weight, epsilon, dtype)


def _mean(x: Tensor, n: int) -> Tensor:
    """The mean [s, b, h] of streams [s, n b, h]."""
    return x.view(x.size(0), n, -1, x.size(-1)).mean(1)


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
