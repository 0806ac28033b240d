"""SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202) on Megatron-core's modules."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import mlp
from torch import Tensor

from keel_megatron.compat import modules
from keel_megatron.kernels.swiglu import swiglu
from keel_megatron.model.recompute import free_until_backward


class MLP(mlp.MLP):
    """W_down (silu(W_gate x) * (W_up x)); gate and up are one product.

    The modules (linear_fc1, linear_fc2) and their sharding are Megatron-core's.

    Attributes:
        light: free the inputs of both products until the backward pass (model/recompute.py).
    """

    light = False

    def __init__(self, config: Any, submodules: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, **modules.mlp_arguments(config, kwargs))

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """The branch's output for its normalised input [s, b, h] ([s/TP, b, h] under SP)."""
        gate_up, _bias = self.linear_fc1(hidden_states)
        product = swiglu(gate_up)
        output, bias = self.linear_fc2(product)
        if self.light:
            free_until_backward(hidden_states, gate_up)
            free_until_backward(product, output)
        return output, bias
