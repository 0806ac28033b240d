"""Weight gradients accumulated in fp32 by the matrix product that computes them.

Megatron-core's DDP keeps an fp32 sum of each weight's gradients, `weight.main_grad`. A product that
adds to it saves the gradient as a tensor, the kernel that adds it, and the rounding to the
weight's type. With `weight.grad_added_to_main_grad` DDP knows that nothing is left to add.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_PLACEHOLDER = "keel_returns_placeholder"


def adds_directly(sums: Tensor, dtype: torch.dtype) -> bool:
    """Whether `add_product` adds products of this type to `sums` in one operator.

    Operands of the sums' type: on every device. bf16 or fp16 operands and fp32 sums: on CUDA, where
    torch's addmm takes an output type.
    """
    if sums.dtype == dtype:
        return True
    half = dtype in (torch.bfloat16, torch.float16)
    return sums.is_cuda and sums.dtype == torch.float32 and half and _addmm_takes_fp32_sums(dtype)


@cache
def _addmm_takes_fp32_sums(dtype: torch.dtype) -> bool:
    """Whether CUDA's addmm adds products of half-precision operands to an fp32 matrix.

    The overload exists since torch 2.8, but refused an fp32 `self` beside such operands until it
    was mended in November 2025 (pytorch/pytorch#167931), so it is tried once.
    """
    sums = torch.zeros(16, 16, device="cuda")
    operand = torch.zeros(16, 16, device="cuda", dtype=dtype)
    add: Any = torch.addmm
    try:
        add(sums, operand, operand, out_dtype=torch.float32, out=sums)
    except (RuntimeError, TypeError):
        return False
    return True


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Sums [n, k] + a [n, m] b [m, k], in place.

    Where `adds_directly` is false the product is rounded to its operands' type before it is added.
    """
    if sums.dtype == a.dtype:
        return sums.addmm_(a, b)
    if adds_directly(sums, a.dtype):
        add: Any = torch.addmm
        result: Tensor = add(sums, a, b, out_dtype=sums.dtype, out=sums)
        return result
    return sums.add_(a.mm(b))


def return_placeholder(weight: Tensor) -> None:
    """Make backward passes that add to `weight.main_grad` return a placeholder gradient.

    Megatron-core's DDP with overlap_grad_reduce starts a bucket's reduction from the weights'
    AccumulateGrad hooks, and asserts there that `weight.grad` is set. Without a gradient a hook
    runs in the thread that called the backward pass, and with one on CUDA in the device's thread:
    ranks could start their reductions in different orders.
    """
    setattr(weight, _PLACEHOLDER, True)


def placeholder(weight: Tensor) -> Tensor | None:
    """The gradient to return for a weight after adding to `weight.main_grad`; None: nothing.

    Uninitialised memory, which DDP drops unread; zeros for a weight whose `zero_out_wgrad` is set
    (tied embeddings), because DDP adds what autograd summed over all its uses.
    """
    if not getattr(weight, _PLACEHOLDER, False):
        return None
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)
