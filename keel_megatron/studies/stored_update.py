"""How much of a sub-layer's update survives when the stream is stored in bf16.

One sub-layer of Keel without a model: a stream x of RMS 1 that is stored in bf16, a branch F of
independent normal elements, norm weights of 1. With x' = N_out(alpha x + F), the exact update is
x' - x, and the one that the next sub-layer sees is the stored x' minus x. Its size beside the
stream is about std(F) / alpha, and two bf16 numbers are 2^-8 to 2^-7 of their size apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keel_megatron.config.model import Stream
from keel_megatron.kernels import rms_norm, scaled_add_norm
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
    hidden_size: int = 1024,
    tokens: int = 256,
    seed: int = 0,
) -> Kept:
    """What is left of an update under a mode of `model.stream`.

    Args:
        stream: the mode.
        alpha: scale of the skip path.
        branch_std: standard deviation of the branch's elements.
        hidden_size: h.
        tokens: number of independent tokens.
        seed: of streams, branches and stochastic rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, 1, hidden_size)
    weight = torch.ones(hidden_size)
    # A norm's output, as every x_l is: otherwise the update would first of all be x's own norm.
    x = to_nearest(rms_norm(torch.randn(shape, generator=generator), weight, 0.0, torch.float32))
    branch = branch_std * torch.randn(shape, generator=generator)
    noise = Noise(seed, torch.zeros(1, dtype=torch.long))
    bits = noise.bits(0, x) if stream == "bf16_stochastic" else None

    def updated(operation: object) -> Tensor:
        assert callable(operation)
        new, _none = operation(x, branch, alpha, weight, None, 0.0, x.dtype)
        return (new - x).double()

    exact = updated(scaled_add_norm)
    found = updated(storing(stream, scaled_add_norm, bits))
    cosine = torch.cosine_similarity(found, exact, dim=-1)
    along = (found * exact).sum() / exact.square().sum()
    return Kept(float(cosine.mean()), float((found == 0).double().mean()), float(along))
