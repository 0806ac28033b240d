"""What the ranks of the vocabulary-parallel loss's test run."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from keel_megatron.kernels.cross_entropy import Split, linear_cross_entropy
from keel_megatron.kernels.selection import Backend

N, H, V = 36, 16, 54
ROWS = (64, 36, 10, 7)
"""All of the 36 rows at once, and pieces that do and do not divide them."""
Z_LOSS = 1e-2
"""So large that its gradient is of the cross entropy's size."""


def drawn(dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [n, h], weight [v, h], labels [n] and the losses' gradients [n], a fifth of them 0."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, H, generator=generator, dtype=torch.float64) for size in (N, V))
    labels = torch.randint(0, V, (N,), generator=generator)
    gradients = torch.rand(N, generator=generator, dtype=torch.float64)
    gradients[::5] = 0.0  # masked tokens
    wide = torch.promote_types(dtype, torch.float32)
    return (scale * x).to(dtype), weight.to(dtype), labels, gradients.to(wide)


def split_results_in_triton() -> dict[tuple[bool, int, float], list[Tensor]]:
    """`split_results` of the Triton kernels, in fp32."""
    return split_results(torch.float32, "triton", ROWS[1:3])


def split_results(
    dtype: torch.dtype = torch.float64,
    backend: Backend = "torch",
    pieces: tuple[int, ...] = ROWS,
    z_losses: tuple[float, ...] = (0.0, Z_LOSS),
) -> dict[tuple[bool, int, float], list[Tensor]]:
    """By (sequence, rows, z-loss): losses, dx and dW of this rank."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    rank, size = group.rank(), group.size()
    x, weight, labels, gradients = drawn(dtype, scale=30.0)
    found = {}
    for sequence in (False, True):
        for rows, z_loss in itertools.product(pieces, z_losses):
            own_x = (x.chunk(size)[rank] if sequence else x).clone().requires_grad_()
            own = torch.nn.Parameter(weight.chunk(size)[rank].clone())
            split = Split(group, sequence)
            losses = linear_cross_entropy(
                own_x, own, labels, rows=rows, z_loss=z_loss, split=split, backend=backend
            )
            own_dx, own_dw = torch.autograd.grad(losses, (own_x, own), gradients)
            found[sequence, rows, z_loss] = [losses.detach(), own_dx, own_dw]
    dist.destroy_process_group()
    return found
