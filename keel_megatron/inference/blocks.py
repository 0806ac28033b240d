"""Blocks of a model for generation: the weights of model/layer.py with keys and values kept.

A token passes every block with one column. On a CPU at such sizes Python takes most of the time, so
the weights are used directly, not through Megatron-core's modules. How a branch joins the stream is
model/join.py's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from keel_megatron.architecture.residual import Reader
from keel_megatron.inference.cache import Columns
from keel_megatron.kernels import rms_norm, scaled_add_norm
from keel_megatron.kernels.fused import RmsNorm, ScaledAddNorm
from keel_megatron.kernels.head_norms import HeadNorms, Weights
from keel_megatron.kernels.swiglu import Swiglu, swiglu
from keel_megatron.model.attention import causal_attention
from keel_megatron.model.join import COLUMNS, Front, join
from keel_megatron.model.layer import AfterWeights
from keel_megatron.model.stream import storing

GENERATION = Reader("generation", (*COLUMNS, "head_norms"))


class Block:
    """One block: attention with a cache, FFN, and the joins of both.

    Args:
        layer: the model's block (model/layer.py), in evaluation mode.
        number: its number on this stage, from 0.
    """

    def __init__(self, layer: Any, number: int) -> None:
        block = layer.layer_number - 1
        attention, mlp = layer.self_attention, layer.mlp
        self.number = number
        self.operation = storing(layer.model.stream, _scaled_add_norm)
        self.groups = attention.num_query_groups_per_partition
        self.head_dim = attention.hidden_size_per_attention_head
        self.qkv, self.projection = attention.linear_qkv.weight, attention.linear_proj.weight
        self.norms: Weights | None = attention.norm_weights
        self.gate_up, self.down = mlp.linear_fc1.weight, mlp.linear_fc2.weight
        self.group = mlp.linear_fc2.tp_group
        self.split = self.group.size() > 1
        self.epsilon, self.dtype = layer.config.layernorm_epsilon, layer.config.params_dtype
        self.attention_rule = GENERATION.sub_layer(2 * block, layer.model)
        self.mlp_rule = GENERATION.sub_layer(2 * block + 1, layer.model)
        self.after_attention: AfterWeights = layer.after_weights("attention")
        self.after_mlp: AfterWeights = layer.after_weights("mlp")
        self.mlp_front: Front = layer.front("mlp")
        following = layer.following[0] if layer.following else None
        self.next_front: Front | None = following and following.front("attention")

    def forward(
        self,
        x: Tensor,
        z: Tensor,
        rotation: tuple[Tensor, ...],
        columns: Columns,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after both sub-layers, and the next block's attention input.

        Args:
            x: the stream [s, b, h] of the next s columns; s = 1, or the cache is empty.
            z: attention's input [s, b, h].
            rotation: cos and signed sin of the columns, [s, 1, 1, 1, d].
            columns: these columns of the cache; their keys and values are added.
            bias: `columns.bias(s)`.

        Returns:
            x' [s, b, h], and z [s, b, h], or None after the stage's last block.
        """
        context = self._attend(functional.linear(z, self.qkv), rotation, columns, bias)
        branch = self._summed(functional.linear(context, self.projection))
        x, inside = join(
            self.operation,
            self.attention_rule,
            x,
            branch,
            *self.after_attention,
            self.mlp_front,
            self.epsilon,
            self.dtype,
            norm=_rms_norm,
        )
        assert inside is not None
        product = _swiglu(functional.linear(inside, self.gate_up))
        return join(
            self.operation,
            self.mlp_rule,
            x,
            self._summed(functional.linear(product, self.down)),
            *self.after_mlp,
            self.next_front,
            self.epsilon,
            self.dtype,
            norm=_rms_norm,
        )

    def _attend(
        self,
        mixed: Tensor,
        rotation: tuple[Tensor, ...],
        columns: Columns,
        bias: Tensor | None,
    ) -> Tensor:
        """Attention's output [s, b, heads x d] of linear_qkv's."""
        s, b = mixed.shape[:2]
        cos, sin = rotation
        if self.norms is not None:
            mixed = HeadNorms.forward(_NoRecord(), mixed, *self.norms, self.groups, self.epsilon)
        parts = mixed.view(s, b, self.groups, -1, self.head_dim)
        rotated, value = parts[..., :-1, :], parts[..., -1, :]
        # The halves of a head are exchanged by turning it by half of its length.
        swapped = rotated.roll(self.head_dim // 2, -1)
        rotated = torch.addcmul(rotated * cos, swapped, sin)
        query, key = rotated[..., :-1, :], rotated[..., -1, :]
        keys, values = columns.append(self.number, key, value)
        if s > 1:
            return causal_attention(query.reshape(s, b, -1, self.head_dim), key, value, within=bias)
        # The queries of a group take the place of its columns: one kernel call, nothing repeated.
        context = functional.scaled_dot_product_attention(query[0], keys, values, attn_mask=bias)
        return context.reshape(1, b, -1)

    def _summed(self, branch: Tensor) -> Tensor:
        """The branch, summed over the tensor group."""
        if self.split:
            dist.all_reduce(branch, group=self.group)
        return branch


class _NoRecord:
    """In the place of autograd's context: nothing is kept for a backward pass."""

    def save_for_backward(self, *_tensors: Any) -> None:
        """Keep nothing."""


def _scaled_add_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    """`kernels.scaled_add_norm`; on a CPU without autograd, a third of its time at one column."""
    return scaled_add_norm(x, *rest) if x.is_cuda else ScaledAddNorm.forward(_NoRecord(), x, *rest)


def _rms_norm(x: Tensor, *rest: Any) -> Tensor:
    """`kernels.rms_norm`, in the same way."""
    return rms_norm(x, *rest) if x.is_cuda else RmsNorm.forward(_NoRecord(), x, *rest)


def _swiglu(x: Tensor) -> Tensor:
    """`kernels.swiglu`, in the same way."""
    return swiglu(x) if x.is_cuda else Swiglu.forward(_NoRecord(), x)
