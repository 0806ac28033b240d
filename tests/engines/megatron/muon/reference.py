"""Muon from its equations, in fp64: one matrix at a time, by its singular values.

Independent of the package: nothing of it is imported. Newton-Schulz iteration maps the singular
values of a matrix and keeps its singular vectors, so no product of the iteration is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """U p(p(...p(S / ||S||))) V^T with p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / max(float(s.square().sum().sqrt()), 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


class Muon:
    """Of one matrix.

    Args:
        matrix: its start.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: decay of the momentum buffer.
        nesterov: whether to look ahead.
        steps: of Newton-Schulz.
        match: match_rms_adamw rather than original.
    """

    def __init__(
        self,
        matrix: Tensor,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        steps: int,
        match: bool,
    ) -> None:
        self.matrix = matrix.double()
        self.buffer = torch.zeros_like(self.matrix)
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.nesterov, self.steps, self.match = nesterov, steps, match

    def step(self, gradient: Tensor) -> None:
        gradient = gradient.double()
        self.buffer = self.momentum * self.buffer + (1 - self.momentum) * gradient
        direction = self.buffer
        if self.nesterov:
            direction = self.momentum * self.buffer + (1 - self.momentum) * gradient
        rows, columns = self.matrix.shape
        factor = max(1.0, rows / columns) ** 0.5
        if self.match:
            factor = 0.2 * max(rows, columns) ** 0.5
        moved = self.lr * factor * orthogonalized(direction, self.steps)
        self.matrix = (1 - self.lr * self.weight_decay) * self.matrix - moved
