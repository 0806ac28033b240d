"""One block: an attention and an FFN sub-layer, each joined to the fp32 stream by its rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
from keel_megatron.kernels import scaled_add_norm
from keel_megatron.model.norm import RMSNorm
from keel_megatron.model.residual import SubLayer, sub_layer

Observer = Callable[[int, Tensor, Tensor, float, Tensor], None]
"""Is told (l, x, F, alpha, x') of every sub-layer's sum: its global number from 0, the stream
before it, its branch's output, the scale of the skip path and the stream after it."""

Compiled = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(stream, attention input, rotary table) to what `KeelLayer.forward` returns."""


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

    Attributes:
        observer: told of every sum while it is set; None otherwise.
        compiled: the same block in compiled form (model/compiled.py), which trains in its place
            while nobody observes; None where it is not asked for.
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
        self.following: tuple[KeelLayer, ...] = ()
        self.observer: Observer | None = None
        self.compiled: Compiled | None = None
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
        context: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after both sub-layers.

        Args:
            hidden_states: the stream x, fp32 [s, b, h] ([s/TP, b, h] under sequence parallelism).
            attention_mask: unused; attention is causal.
            rotary_pos_emb: the table of model/rotary.py.
            context: this block's attention input, where the block before has computed it with its
                own last norm. Megatron-core's blocks hand it on for cross-attention.

        Returns:
            The stream, shaped and typed as it came, and the next block's attention input, or None
            after a chunk's last block.
        """
        x, l = hidden_states, 2 * (self.layer_number - 1)
        z = self.input_layernorm(x) if context is None else context
        if self.compiled is not None and self.training and self.observer is None:
            return self.compiled(x, z, rotary_pos_emb)
        branch, _bias = self.self_attention(z, attention_mask, rotary_pos_emb=rotary_pos_emb)
        x, z = self.join(
            l, x, branch, self.attention_rule, self.attention_outer_norm, self.pre_mlp_layernorm
        )
        branch, _bias = self.mlp(z)
        following = self.following[0].input_layernorm if self.following else None
        return self.join(l + 1, x, branch, self.mlp_rule, self.mlp_outer_norm, following)

    def join(
        self,
        l: int,
        x: Tensor,
        branch: Tensor,
        rule: SubLayer,
        outer_norm: nn.Module | None,
        following: nn.Module | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after a sub-layer, N_out(alpha x + F), and the following branch's input.

        Where the following branch has an inner norm, that is one kernel (kernels/__init__.py).

        Args:
            l: the sub-layer's global number, from 0.
            x: the stream before it.
            branch: F, in the compute type.
            rule: the sub-layer's rule.
            outer_norm: N_out, or None.
            following: what stands before the following branch, or None if it is not known here.
        """
        if self.hidden_dropout and self.training:
            branch = functional.dropout(branch, self.hidden_dropout)
        inner_norm = following if isinstance(following, RMSNorm) else None
        x_new, z = scaled_add_norm(
            x,
            branch,
            rule.alpha,
            None if outer_norm is None else outer_norm.gain,  # type: ignore[arg-type]
            None if inner_norm is None else inner_norm.gain,
            self.config.layernorm_epsilon,
            self.config.params_dtype,
        )
        if self.observer is not None:
            self.observer(l, x, branch, rule.alpha, x_new)
        if following is not None and inner_norm is None:
            z = following(x_new)
        return x_new, z


def link(layers: nn.ModuleList) -> None:
    """Tell every block of a chunk which one follows; not as a submodule, which would be a cycle."""
    for layer, following in itertools.pairwise(layers):
        layer.following = (following,)  # type: ignore[assignment]
