"""Newton-Schulz orthogonalisation of many matrices at once, and Muon's factor of the rate.

Muon (K. Jordan, https://kellerjordan.github.io/posts/muon/) replaces a matrix X = U S V^T by about
U V^T. With X / ||X||_F at first, one step of the iteration is

    A = X X^T,   X <- a X + (b A + c A^2) X,

which maps every singular value s to a s + b s^3 + c s^5. Coefficients and epsilon are those of
torch.optim.Muon. Five steps bring singular values above about 0.01 into 0.7 to 1.2; they do not
converge to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keel_megatron.architecture.block_weights import BlockWeight

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c."""
EPSILON = 1e-7
"""The smallest norm that a matrix is divided by."""


def working_dtype(device: torch.device) -> torch.dtype:
    """The type in which matrices are multiplied: bf16 on CUDA, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """About U V^T of every matrix U S V^T.

    The Gram matrix is of rows or of columns, whichever are fewer. The norm is computed in fp32, or
    in fp64 of fp64 matrices.

    Args:
        matrices: [n, rows, columns], contiguous; overwritten. The products are of its type.
        steps: iterations.

    Returns:
        [n, rows, columns]: `matrices`, or a tensor of its type.
    """
    a, b, c = COEFFICIENTS
    exact = torch.promote_types(matrices.dtype, torch.float32)
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=exact)
    x, free = matrices.div_(norms.clamp_(min=EPSILON)), torch.empty_like(matrices)
    wide, smaller = x.size(-2) <= x.size(-1), min(x.shape[-2:])
    gram, polynomial = x.new_empty(2, x.size(0), smaller, smaller)
    for _ in range(steps):
        torch.bmm(*((x, x.mT) if wide else (x.mT, x)), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        factors = (polynomial, x) if wide else (x, polynomial)
        torch.baddbmm(x, *factors, beta=a, out=free)
        x, free = free, x
    return x


def rate_factor(rows: int, columns: int, adjust_lr_fn: str) -> float:
    """Factor of the learning rate of a matrix, as torch.optim.Muon names them.

    original: sqrt(max(1, rows / columns)). match_rms_adamw: 0.2 sqrt(max(rows, columns)), which
    gives an update the root mean square of AdamW's (arXiv 2502.16982).
    """
    if adjust_lr_fn == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def split(weight: BlockWeight, stack: Tensor) -> list[Tensor]:
    """The matrices in a stack of fused weights.

    Args:
        weight: how they are fused.
        stack: [n, rows, columns], each weight of that shape, contiguous.

    Returns:
        Of each matrix a view [n, runs, rows of a run, columns]; `flatten(1, 2)` makes it one matrix
        each.
    """
    runs = stack.view(stack.size(0), weight.runs, sum(weight.rows), weight.columns)
    return list(runs.split_with_sizes(weight.rows, dim=2))
