"""How much of a branch survives when the stream is stored in bf16.

One sub-layer of Keel without a model: a stream x of RMS 1 that is stored in bf16, and a branch F of
independent normal elements. What the branch adds to the stream is N_out(alpha x + F) minus
N_out(alpha x), which is x itself with norm weights of 1; what the next sub-layer sees of it is the
difference of the same two streams, stored. Beside the stream its size is about std(F) / alpha, and
two bf16 numbers are 2^-8 to 2^-7 of their size apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keel_megatron.config.model import Stream
from keel_megatron.kernels import rms_norm, scaled_add_norm
from keel_megatron.model.join import Operation
from keel_megatron.model.stream import Noise, storing, to_nearest


@dataclass(frozen=True)
class Kept:
    """What storing leaves of an update."""

    cosine: float
    """Of the stored and the exact update, mean over tokens."""
    unchanged: float
    """Share of the stream's elements that do not change."""
    along: float
    """Size of the stored update along the exact one, relative to it; 1: unbiased."""


@torch.no_grad()
def kept_update(
    stream: Stream,
    alpha: float,
    branch_std: float,
    weight_std: float = 0.0,
    hidden_size: int = 1024,
    tokens: int = 256,
    seed: int = 0,
) -> Kept:
    """What is left of a branch under a mode of `model.stream`.

    Args:
        stream: the mode.
        alpha: scale of the skip path.
        branch_std: standard deviation of the branch's elements.
        weight_std: standard deviation of N_out's weights around 1.
        hidden_size: h.
        tokens: number of independent tokens.
        seed: of everything drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, 1, hidden_size)
    ones = torch.ones(hidden_size)
    # A norm's output, as every x_l is: otherwise the update would first of all be x's own norm.
    x = to_nearest(rms_norm(torch.randn(shape, generator=generator), ones, 0.0, torch.float32))
    branch = branch_std * torch.randn(shape, generator=generator)
    weight = 1.0 + weight_std * torch.randn(hidden_size, generator=generator)
    bits = None
    if stream == "bf16_stochastic":
        bits = Noise(seed, torch.zeros(1, dtype=torch.long)).bits(0, x)

    def update(operation: Operation) -> Tensor:
        after, before = (
            operation(x, f, alpha, weight, None, 0.0, x.dtype)[0] for f in (branch, 0.0 * branch)
        )
        return (after - before).double()

    exact = update(scaled_add_norm)
    found = update(storing(stream, scaled_add_norm, bits))
    cosine = torch.cosine_similarity(found, exact, dim=-1)
    along = (found * exact).sum() / exact.square().sum()
    return Kept(float(cosine.mean()), float((found == 0).double().mean()), float(along))
