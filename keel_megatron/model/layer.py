"""One block: an attention and an FFN sub-layer, each joined to the fp32 stream by its rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn
from torch.nn import functional

from keel_megatron.config.model import ModelConfig
from keel_megatron.model.residual import SubLayer, sub_layer


@dataclass
class KeelLayerSubmodules(TransformerLayerSubmodules):
    """Megatron-core's submodules, the outer norm, and what stands where an inner norm does not."""

    outer_norm: ModuleSpec | type = IdentityOp
    inner_vector: ModuleSpec | type = IdentityOp
    no_inner: ModuleSpec | type = IdentityOp


class KeelLayer(TransformerLayer):
    """Block number `layer_number` (from 1, global) under the configured residual rule.

    Differs from Megatron-core's layer in what it adds and normalises: the stream stays fp32, the
    skip path is scaled, and an outer norm may follow the addition. Its bias-dropout-add slots,
    which would cast the stream down, are not used.

    Args:
        config: Megatron-core's TransformerConfig.
        submodules: a KeelLayerSubmodules.
        model: the model's section of the run's configuration; says which norms this block has.
        layer_number: number within the stage's chunk, from 1.
        kwargs: what Megatron-core's TransformerBlock passes on.
    """

    def __init__(
        self,
        config: Any,
        submodules: KeelLayerSubmodules,
        model: ModelConfig,
        layer_number: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        block = self.layer_number - 1
        self.attention_rule = sub_layer(2 * block, model)
        self.mlp_rule = sub_layer(2 * block + 1, model)
        instead = {"vector": submodules.inner_vector, "none": submodules.no_inner}
        if self.attention_rule.inner != "norm":
            self.input_layernorm = self._build(instead[self.attention_rule.inner])
        if self.mlp_rule.inner != "norm":
            self.pre_mlp_layernorm = self._build(instead[self.mlp_rule.inner])
        self.attention_outer_norm = (
            self._build(submodules.outer_norm) if self.attention_rule.outer_norm else None
        )
        self.mlp_outer_norm = (
            self._build(submodules.outer_norm) if self.mlp_rule.outer_norm else None
        )

    def _build(self, spec: ModuleSpec | type) -> nn.Module:
        return build_module(
            spec,
            config=self.config,
            hidden_size=self.config.hidden_size,
            eps=self.config.layernorm_epsilon,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """The stream after both sub-layers.

        Args:
            hidden_states: the stream x, fp32 [s, b, h] ([s/TP, b, h] under sequence parallelism).
            attention_mask: unused; attention is causal.
            rotary_pos_emb: the table of model/rotary.py.

        Returns:
            The stream, shaped and typed as it came, and None (no cross-attention context).
        """
        x = hidden_states
        branch, _bias = self.self_attention(
            self.input_layernorm(x), attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        x = self._join(x, branch, self.attention_rule, self.attention_outer_norm)
        branch, _bias = self.mlp(self.pre_mlp_layernorm(x))
        x = self._join(x, branch, self.mlp_rule, self.mlp_outer_norm)
        return x, None

    def _join(
        self, x: Tensor, branch: Tensor, rule: SubLayer, outer_norm: nn.Module | None
    ) -> Tensor:
        """N_out(alpha * x + F) in the stream's type (model/residual.py)."""
        if self.hidden_dropout and self.training:
            branch = functional.dropout(branch, self.hidden_dropout)
        x = rule.alpha * x + branch if rule.alpha != 1.0 else x + branch
        return x if outer_norm is None else outer_norm(x)
