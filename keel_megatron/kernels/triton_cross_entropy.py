"""Softmax and cross entropy of logits as two Triton kernels; the gradient replaces the logits.

`kernels/cross_entropy.py` uses them on the logits z [n, v] in the type of the matrix product. The
first reads every logit once and leaves two numbers per row, in fp32: log-sum-exp and the label's
logit. The second reads every logit once more and writes its gradient in its place. Under bf16 these
are 6 bytes a logit: 2 and 4.
"""

# Triton's functions take pointers, and its decorator is untyped.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
BLOCK = 4096
"""Logits of a row at a time in a program: 16 a thread."""
WARPS = 8


@triton.jit
def _row_sums(
    logits_ptr,  # [rows, v]
    place_ptr,  # [rows], int64
    log_sum_ptr,  # [rows], fp32, as score
    score_ptr,
    v,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * v
    largest = tl.full((), float("-inf"), tl.float32)
    # Each lane sums its own columns, relative to the largest logit of the row so far.
    sums = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, v, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = tl.load(logits_ptr + column, mask=column < v, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(z, axis=0))
        # Of a row that has had nothing but -inf so far: inf - inf would be no number.
        base = tl.where(larger == float("-inf"), 0.0, larger)
        sums = sums * tl.exp(largest - base) + tl.exp(z - base)
        largest = larger
    tl.store(log_sum_ptr + row, largest + tl.log(tl.sum(sums, axis=0)))
    place = tl.load(place_ptr + row)
    tl.store(score_ptr + row, tl.load(logits_ptr + place).to(tl.float32))


@triton.jit
def _gradient(
    logits_ptr,  # [rows, v]; becomes the gradient
    place_ptr,  # [rows], int64
    log_sum_ptr,  # [rows], fp32, as d and at_label
    d_ptr,
    at_label_ptr,
    v,
    BLOCK_V: tl.constexpr,
):
    blocks = tl.cdiv(v, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = row * v + column
    z = tl.load(logits_ptr + at, mask=column < v, other=float("-inf")).to(tl.float32)
    dz = tl.exp(z - tl.load(log_sum_ptr + row)) * tl.load(d_ptr + row)
    label = column == tl.load(place_ptr + row)
    dz += tl.where(label, tl.load(at_label_ptr + row), 0.0)
    tl.store(logits_ptr + at, dz.to(logits_ptr.dtype.element_ty), mask=column < v)


def row_sums(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every row, and its logit at the row's place: [n, 1], fp32.

    Args:
        logits: [n, v], contiguous, fp32 or bf16.
        places: [n, 1], int64, below v.
    """
    log_sums, scores = (
        torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    if len(logits):
        _row_sums[(len(logits),)](
            logits,
            places.contiguous(),
            log_sums,
            scores,
            logits.size(1),
            BLOCK_V=BLOCK,
            num_warps=WARPS,
        )
    return log_sums, scores


def to_gradient(
    logits: Tensor, places: Tensor, log_sums: Tensor, d: Tensor, at_label: Tensor
) -> Tensor:
    """Replace logits by exp(logits - log_sums) d, plus at_label at the row's place.

    Args:
        logits: [n, v], contiguous; modified in place, which autograd is told, and returned.
        places: [n, 1], int64, below v.
        log_sums: [n, 1], fp32, as the following.
        d: factor of the row's softmax.
        at_label: what is added at the place.
    """
    rows, v = logits.shape
    if rows:
        _gradient[(rows * triton.cdiv(v, BLOCK),)](
            logits,
            places.contiguous(),
            log_sums.contiguous(),
            d.contiguous(),
            at_label.contiguous(),
            v,
            BLOCK_V=BLOCK,
            num_warps=WARPS,
        )
    increment: Any = torch.autograd.graph.increment_version
    increment(logits)
    return logits
