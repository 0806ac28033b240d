"""The modules of a model with several residual streams (hyper-connections)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from keel_megatron.model.norm import BranchCast, RMSNorm, stream_dtype


class StreamMix(nn.Module):
    """A sub-layer's mix of n streams, one learned vector [n (n + 2)] (kernels/streams.py).

    At first the sub-layer reads stream l mod n, and every stream gets its branch as it is: A is the
    identity and b is 1 (arXiv 2409.19606, equation 14).

    Args:
        config: Megatron-core's TransformerConfig.
        streams: n.
        l: the sub-layer's number over the whole model, from 0.
    """

    def __init__(self, config: Any, streams: int, l: int) -> None:
        super().__init__()
        dtype = stream_dtype(config.params_dtype)
        self.stream_dtype = dtype
        unit = torch.zeros(streams, dtype=dtype)
        unit[l % streams] = 1.0
        rest = torch.ones(streams, dtype=dtype), torch.eye(streams, dtype=dtype).flatten()
        device = torch.empty(0).device
        self.weight = nn.Parameter(torch.cat((unit, *rest)).to(device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    @property
    def stream_weight(self) -> Tensor:
        """The mix in the stream's type."""
        return self.weight.to(self.stream_dtype)


def spread(x: Tensor, streams: int) -> Tensor:
    """Every stream a copy of x [s, b, h]: [s, n b, h]."""
    return x if streams == 1 else x.repeat(1, streams, 1)


def merged(x: Tensor, streams: int) -> Tensor:
    """The sum [s, b, h] of streams [s, n b, h]."""
    return x.view(x.size(0), streams, -1, x.size(-1)).sum(1)


class MergedNorm(RMSNorm):
    """The final norm, of the sum of the streams."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, streams: int = 1) -> None:
        super().__init__(config, hidden_size, eps)
        self.streams = streams

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the sum of streams [s, n b, h]: [s, b, h]."""
        return super().forward(merged(x, self.streams))


class MergedCast(BranchCast):
    """Without a final norm: the sum of the streams in the type of the matrix products."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, streams: int = 1) -> None:
        super().__init__(config, hidden_size, eps)
        self.streams = streams

    def forward(self, x: Tensor) -> Tensor:
        """Of streams [s, n b, h]: [s, b, h]."""
        return super().forward(merged(x, self.streams))
