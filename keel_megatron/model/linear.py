"""Megatron-core's parallel linear layers, with a fast path for tensor-parallel size 1.

Deep, narrow models are bound by operator overhead. Without communication, Megatron-core's linear
layer is a matrix product in three autograd functions. Here it is one, which also accumulates the
weight's gradient directly in the fp32 buffer where the types allow it. Parameters, sharding and
checkpoints are Megatron-core's.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from keel_megatron.kernels.weight_gradients import add_product, adds_directly, placeholder

_RETURNED = "keel_returns_gradient"


class ColumnParallelLinear(layers.ColumnParallelLinear):
    """X W^T with W split by rows (output features) over the tensor group; no bias."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Project [s, b, k] to [s, b, n / TP]; `weight` replaces its own (tied embeddings)."""
        if not _is_plain(self):
            return super().forward(input_, weight, *args, **kwargs)
        return linear(input_, self.weight if weight is None else weight), None


class RowParallelLinear(layers.RowParallelLinear):
    """X W^T with W split by columns (input features) over the tensor group; no bias."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Project [s, b, k / TP] to [s, b, n], summed over the tensor group."""
        if not _is_plain(self):
            return super().forward(input_)
        return linear(input_, self.weight), None


def _is_plain(module: Any) -> bool:
    """Whether the fast path applies: no communication, and no gradient fusion by Apex."""
    fused = module.gradient_accumulation_fusion
    return module.tp_group.size() == 1 and module.bias is None and not fused


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T for x [..., k] and weight [n, k].

    The weight's gradient is accumulated in `weight.main_grad` by its product if Megatron-core's DDP
    has one that it can add to (kernels/weight_gradients.py): of the weight's type on any device,
    or fp32 for bf16 on CUDA. Otherwise, or with a hook on the weight, it goes to `weight.grad`.
    """
    sums = gradient_sums(weight)
    if sums is None or not adds_directly(sums, weight.dtype):
        return functional.linear(x, weight)
    operation: Any = _AccumulatingLinear
    result: Tensor = operation.apply(x, weight)
    return result


def gradient_sums(weight: Tensor) -> Tensor | None:
    """`weight.main_grad`, if the backward pass may accumulate in it; else None."""
    if weight._backward_hooks or not (torch.is_grad_enabled() and weight.requires_grad):
        return None
    if getattr(weight, _RETURNED, False) or not weight.is_leaf:
        return None
    return getattr(weight, "main_grad", None)


def return_gradient(weight: Tensor) -> None:
    """Keep backward passes from accumulating in `weight.main_grad`, as a CUDA graph needs it.

    The capture runs the backward pass, and would leave its own gradients in the sums.
    """
    setattr(weight, _RETURNED, True)


class _AccumulatingLinear(torch.autograd.Function):
    """functional.linear whose weight gradient is added to `weight.main_grad` by the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.size(-1))
        add_product(weight.main_grad, rows.t(), x.reshape(-1, x.size(-1)))
        weight.grad_added_to_main_grad = True
        dx = rows.mm(weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, placeholder(weight)
