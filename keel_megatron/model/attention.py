"""Causal grouped-query self-attention on torch's scaled_dot_product_attention."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn
from torch.nn import functional

from keel_megatron.architecture.residual import NormedParts
from keel_megatron.kernels.head_norms import Weights
from keel_megatron.model.attention_kernel import expands_groups
from keel_megatron.model.documents import Documents, Packed
from keel_megatron.model.recompute import free_until_backward
from keel_megatron.model.rotary import split_rotary


class SdpaAttention(nn.Module):
    """softmax(Q K^T / sqrt(d), causal) V without the s x s matrix in memory.

    Replaces Megatron-core's DotProductAttention, with the same constructor arguments.
    """

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.dropout = float(config.attention_dropout)
        self.sequence_parallel = bool(config.sequence_parallel)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents | None = None,
        **_: Any,
    ) -> Tensor:
        """Compute attention.

        Args:
            query: [s, b, heads, d].
            key: [s, b, groups, d]; heads is a multiple of groups.
            value: [s, b, groups, d].
            documents: attention is kept within them; in the place of Megatron-core's mask.

        Returns:
            [s, b, heads x d].
        """
        dropout = self.dropout if self.training else 0.0
        # Heads are split over the tensor group: their masks must differ there. Under sequence
        # parallelism the whole block already draws from that generator.
        tracker = tensor_parallel.get_cuda_rng_tracker()
        fork = tracker.fork() if dropout and not self.sequence_parallel else nullcontext()
        with fork:
            within = None if documents is None else documents.within(query, query.size(-1))
            return causal_attention(query, key, value, dropout, within)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    within: Tensor | Packed | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(d), causal) V; shapes as in `SdpaAttention.forward`.

    Args:
        query: [s, b, heads, d].
        key: [s, b, groups, d].
        value: [s, b, groups, d].
        dropout: probability.
        within: of `Documents.within`; None: each sequence is one document.
    """
    if isinstance(within, Packed):
        return _packed_attention(query, key, value, dropout, within)
    s, b, heads, d = query.shape
    if key.size(2) != heads and expands_groups(query.device, query.dtype):
        key, value = (x.repeat_interleave(heads // x.size(2), dim=2) for x in (key, value))
    out = functional.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=within,
        dropout_p=dropout,
        is_causal=within is None,
        enable_gqa=key.size(2) != heads,
    )
    return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)


def _packed_attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, within: Packed
) -> Tensor:
    """`causal_attention` in FlashAttention's kernel for sequences of many lengths.

    torch's `varlen_attn` calls this operator too, but has no dropout, and torch 2.9 lacks it. The
    kernel wants every document's tokens one after another, so with several sequences in a
    micro-batch its operands and its result are copied.
    """
    s, b, heads, d = query.shape
    operands = [x.transpose(0, 1).reshape(b * s, -1, d) for x in (query, key, value)]
    borders, longest = within
    aten: Any = torch.ops.aten
    out: Tensor = aten._flash_attention_forward(
        *operands, borders, borders, longest, longest, dropout, True, False
    )[0]
    return out.view(b, s, heads * d).transpose(0, 1).contiguous()


class SelfAttention(MegatronSelfAttention):
    """Megatron-core's self-attention with a forward pass for training only.

    The modules (linear_qkv, core_attention, linear_proj) and their sharding are Megatron-core's;
    inference engines, packed sequences and offloading are not supported.

    Args:
        config: Megatron-core's TransformerConfig.
        submodules: Megatron-core's; q_layernorm is the class of all norms of heads.
        layer_number: number within the stage's chunk, from 1.
        norms: of the heads, as `SubLayer.head_norms` has them.
        kwargs: further arguments of Megatron-core's layer.

    Attributes:
        light: free linear_qkv's input until the backward pass (model/recompute.py).
    """

    light = False

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int,
        norms: NormedParts = "",
        **kwargs: Any,
    ) -> None:
        # Built here: megatron-core 0.18 refuses them where its qk_layernorm is off, and with it on
        # would sum their gradients over the tensor group a second time.
        plain = replace(submodules, q_layernorm=None, k_layernorm=None)
        super().__init__(config, plain, layer_number, **kwargs)
        for part in "qkv":
            norm = self._norm(submodules.q_layernorm) if part in norms else None
            setattr(self, f"{part}_layernorm", norm)

    def _norm(self, kind: Any) -> nn.Module:
        return build_module(
            kind,
            hidden_size=self.hidden_size_per_attention_head,
            config=self.config,
            eps=self.config.layernorm_epsilon,
        )

    @property
    def norm_weights(self) -> Weights | None:
        """Weights of the norms of query, key and value; None: there are none."""
        if self.q_layernorm is None:
            return None
        value = None if self.v_layernorm is None else self.v_layernorm.shared_weight
        return self.q_layernorm.shared_weight, self.k_layernorm.shared_weight, value

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG002
        rotary_pos_emb: Tensor,
        attention_bias: Documents | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of hidden_states [s, b, h]; [s/TP, b, h] under sequence parallelism.

        Args:
            hidden_states: the branch's input, normalised.
            attention_mask: unused; attention is causal.
            rotary_pos_emb: the table of model/rotary.py, [2, s, 1, 1, d].
            attention_bias: the micro-batch's documents, within which attention is kept.

        Returns:
            The branch's output, shaped like the input, and its bias (None).
        """
        groups = self.num_query_groups_per_partition
        mixed, _bias = self.linear_qkv(hidden_states)
        if self.light:
            free_until_backward(hidden_states, mixed)
        query, key, value = split_rotary(
            mixed,
            rotary_pos_emb,
            groups,
            norms=self.norm_weights,
            eps=self.config.layernorm_epsilon,
        )
        context = self.core_attention(
            query, key, value, attention_bias, attn_mask_type=self.attn_mask_type
        )
        return self.linear_proj(context)
