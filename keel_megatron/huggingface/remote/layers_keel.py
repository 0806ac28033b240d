"""Norms and residual streams of a Keel language model.

Several streams (static hyper-connections, arXiv 2409.19606) lie one after another along the batch:
x [n batch, tokens, h].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class KeelRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """N(x), fp32."""
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * self.weight.float()


class KeelVector(nn.Module):
    """A learned vector in place of an inner norm."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x, each channel scaled; fp32."""
        return x * self.weight.float()


class KeelStreams(nn.Module):
    """The streams at one sub-layer; a single stream is read as it is, and gets the sum.

    The weight is a [n], b [n] and A [n, n], row by row: the branch F reads sum_j a_j x^j, and
    x'^k = sum_j A_jk x^j + b_k F.
    """

    def __init__(self, streams: int) -> None:
        super().__init__()
        self.streams = streams
        if streams > 1:
            self.weight = nn.Parameter(torch.ones(streams * (streams + 2)))

    def read(self, x: Tensor) -> Tensor:
        """What the branch reads [batch, tokens, h], fp32."""
        n = self.streams
        if n == 1:
            return x
        return torch.tensordot(self.weight[:n].float(), x.view(n, -1, *x.shape[1:]), dims=1)

    def joined(self, x: Tensor, alpha: float, branch: Tensor) -> Tensor:
        """The stream or the streams after the sub-layer, fp32."""
        n = self.streams
        if n == 1:
            return alpha * x + branch
        weight = self.weight.float()
        mixed = torch.tensordot(weight[2 * n :].view(n, n).t(), x.view(n, -1, *x.shape[1:]), dims=1)
        return (mixed + weight[n : 2 * n].view(n, 1, 1, 1) * branch).flatten(0, 1)


def spread(x: Tensor, streams: int) -> Tensor:
    """Every stream a copy of x [batch, tokens, h]."""
    return x.repeat(streams, 1, 1)


def merged(x: Tensor, streams: int) -> Tensor:
    """The sum [batch, tokens, h] of the streams."""
    return x.view(streams, -1, *x.shape[1:]).sum(0)
