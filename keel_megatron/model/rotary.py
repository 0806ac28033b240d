"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in its rotate-half form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """cos and sin of every position, computed once and shared by all blocks.

    Stands where Megatron-core's GPTModel keeps its `rotary_pos_emb`, which hands every block the
    angles and lets each compute their cosines again.

    Args:
        head_dim: d, even.
        theta: base of the geometric series of frequencies.
        seq_length: longest sequence.
        dtype: the compute type, of the table.
    """

    table: Tensor

    def __init__(self, head_dim: int, theta: float, seq_length: int, dtype: torch.dtype) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        positions = torch.arange(seq_length, dtype=torch.float64)
        angles = torch.outer(positions, theta**-exponents)
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
        self.register_buffer("table", table.to(dtype)[:, :, None, None, :], persistent=False)

    def get_rotary_seq_len(
        self,
        inference_context: Any,  # noqa: ARG002
        transformer: Any,
        transformer_input: Tensor | None,
        config: Any,
        packed_seq_params: Any = None,  # noqa: ARG002
    ) -> int:
        """Whole sequence length of the stage's input [s, b, h] (s is split under SP)."""
        states = transformer_input if transformer_input is not None else transformer.input_tensor
        factor = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return int(states.size(0)) * int(factor)

    def forward(self, seq_length: int, **_: Any) -> Tensor:
        """Table [2, s, 1, 1, d]: cos, then sin (its first half negated), in the compute type."""
        return self.table[:, :seq_length]


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of x [s, b, heads, d] by the table's angles.

    The table's sine carries the sign, so the half-turn (-x2, x1) * sin is a swap of halves.
    """
    half = x.size(-1) // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * table[0] + swapped * table[1]
