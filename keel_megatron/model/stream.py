"""`model.stream`: the type in which the residual stream is stored after every sub-layer.

For studies of what a narrow stream costs. The stream of a bf16 mode stays an fp32 tensor that holds
bf16 numbers, so kernels, pipeline messages (fp32) and gradient buffers are those of an fp32 stream.
With x the stored stream, r the rounding to bf16 (to nearest), and N_out absent where the rule has
none:

- `bf16`: x' = r(N_out(alpha x + F)), sum and norm in fp32;
- `bf16_stochastic`: the same, rounded up or down at random so that the mean is the exact value;
- `bf16_add`: x' = r(N_out(r(r(alpha x) + r(F)))), the sum as bf16 tensors are added, and the norm
  as `torch.rms_norm` computes it for a bf16 tensor, in fp32 with a bf16 result.

x_0, the embedding's output, is stored in the same way, and every N_in reads the stored stream, in
fp32. Matrix products keep the type of `training.precision`.

The gradient of a stored stream is what a bf16 tensor's is: bf16. Its two contributions, from the
skip path and from N_in, are summed in fp32, and the sum is rounded to nearest once, in all three
modes. Under `bf16_add` autograd also rounds the gradients of the sum and of its terms.

Only training rounds at random: validation and generation round to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keel_megatron.config.model import Stream
from keel_megatron.kernels import rms_norm
from keel_megatron.model.join import Operation

_WORD = 0xFFFFFFFF
_LOW = 0xFFFF
"""The bits of an fp32 number that bf16 has not."""


class Stored(torch.autograd.Function):
    """A tensor rounded to bf16 and kept in its own type; the gradient is rounded to nearest."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, bits: Tensor | None) -> Tensor:
        """X of any shape, rounded to nearest or, with bits (`Noise.bits`), stochastically."""
        return to_nearest(x) if bits is None else stochastically(x, bits)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of a bf16 tensor."""
        return to_nearest(gradient), None


def to_nearest(x: Tensor) -> Tensor:
    """The nearest bf16 numbers, ties to even, in x's type."""
    return x.bfloat16().to(x.dtype)


def stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """One of the two neighbouring bf16 numbers, in x's type, with the mean x.

    The upper one is taken with the probability (x - lower) / (upper - lower), a multiple of 2^-16:
    the bits that bf16 has not carry into those it has. Infinities and NaN stay.

    Args:
        x: fp32, or fp64, which is first rounded to fp32.
        bits: int32 of x's shape, uniform in [0, 2^16).
    """
    narrow = x.float()
    rounded = (narrow.view(torch.int32) + bits).bitwise_and_(~_LOW).view(torch.float32)
    return torch.where(narrow.isfinite(), rounded, narrow).to(x.dtype)


def storing(stream: Stream, operation: Operation, bits: Tensor | None = None) -> Operation:
    """A sum and its norms with a result stored as `stream` says; for fp32, the operation itself.

    Args:
        stream: `model.stream`.
        operation: sum and norms in fp32 (`kernels.scaled_add_norm`).
        bits: for stochastic rounding; None rounds to nearest.
    """
    return operation if stream == "fp32" else partial(_stored_sum, stream, operation, bits)


def _stored_sum(
    stream: Stream,
    operation: Operation,
    bits: Tensor | None,
    x: Tensor,
    f: Tensor,
    alpha: float,
    outer_weight: Tensor | None,
    inner_weight: Tensor | None,
    eps: float,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """As `kernels.scaled_add_norm`; z is of the stored stream."""
    if stream == "bf16_add":
        # Real bf16 tensors, so that autograd gives what it gives such code.
        x_new = (x.bfloat16() * alpha + f.bfloat16()).to(x.dtype)
        if outer_weight is not None:
            x_new = rms_norm(x_new, outer_weight, eps, x.dtype)
    else:
        x_new, _none = operation(x, f, alpha, outer_weight, None, eps, z_dtype)
    x_new = stored(stream, x_new, bits)
    return x_new, None if inner_weight is None else rms_norm(x_new, inner_weight, eps, z_dtype)


def stored(stream: Stream, x: Tensor, bits: Tensor | None = None) -> Tensor:
    """The stream x as `stream` stores it; x itself for fp32."""
    if stream == "fp32":
        return x
    result: Tensor = Stored.apply(x, bits)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Noise:
    """The random bits of a micro-batch, for every sub-layer.

    A hash of seed, sequence, sub-layer, position and channel, not a generator with a state: tensor
    ranks agree, a recomputed pass repeats them, and they are the same at every layout and after a
    resume. A sequence is known by its number in the run's order of samples, which no two steps
    share: the number stands for the step too.

    Args:
        seed: `training.seed`.
        sequences: numbers of the micro-batch's sequences in the run, int64 [b].
        part: number of this rank's part of each sequence under sequence parallelism, else 0.
    """

    seed: int
    sequences: Tensor
    part: int = 0
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def bits(self, l: int, x: Tensor) -> Tensor:
        """Bits for the stream after sub-layer l, int32 of x's shape in [0, 2^16).

        Args:
            l: the sub-layer's global number from 0; -1: the embedding.
            x: the stream [s, b, h], or this rank's part of it.
        """
        keys = _mixed(self._keys() ^ _mixed(l + 1))
        words = _mixed(self._places(x) ^ keys[None, :, None])
        return torch.cat((words & _LOW, words >> 16), dim=2)[:, :, : x.size(2)].int()

    def _keys(self) -> Tensor:
        """A word of every sequence, int64 [b] in [0, 2^32); once a micro-batch."""
        if "keys" not in self._kept:
            low = (self.sequences & _WORD) ^ _mixed(self.seed & _WORD)
            self._kept["keys"] = _mixed(_mixed(low) ^ (self.sequences >> 32))
        return self._kept["keys"]

    def _places(self, x: Tensor) -> Tensor:
        """A word of every position and two channels, int64 [s, 1, h / 2]; once a micro-batch."""
        s, pairs = x.size(0), (x.size(2) + 1) // 2
        if "places" not in self._kept:
            first = self.part * s
            positions = torch.arange(first, first + s, device=x.device)[:, None, None]
            numbers = positions * pairs + torch.arange(pairs, device=x.device)
            self._kept["places"] = _mixed(numbers & _WORD)
        return self._kept["places"]


def _mixed(x: Any) -> Any:
    """A bijective hash of 32-bit words, which changes the tensor x in place.

    "lowbias32" with the constants of github.com/skeeto/hash-prospector, issue 19. They are less
    than 2^31, so that no product of an int64 overflows.

    Args:
        x: an int, or an int64 tensor, in [0, 2^32).
    """
    x ^= x >> 16
    x *= 0x21F0AAAD
    x &= _WORD
    x ^= x >> 15
    x *= 0x735A2D97
    x &= _WORD
    x ^= x >> 15
    return x
