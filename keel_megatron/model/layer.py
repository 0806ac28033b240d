"""One block: an attention and an FFN sub-layer, each joined to the fp32 stream by its rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn

from keel_megatron.architecture.residual import Reader, SubLayer
from keel_megatron.config.model import ModelConfig
from keel_megatron.kernels import recomputable_rms_norm, rms_norm, scaled_add_norm, streams
from keel_megatron.model.documents import Documents
from keel_megatron.model.join import COLUMNS, Front, join, weight_of
from keel_megatron.model.micro_batch import MicroBatch
from keel_megatron.model.stream import Noise, stored, storing
from keel_megatron.model.streams import StreamMix

BLOCKS = Reader("a block of the model", (*COLUMNS, "head_norms"))

Observer = Callable[[int, Tensor, Tensor, float, Tensor], None]
"""Called with (l, x, F, alpha, x') for each sub-layer: its global number from 0, the stream before
it, its branch's output as it is added, the scale of the skip path and the stream after it."""

SubLayerName = Literal["attention", "mlp"]
AfterWeights = tuple[Tensor | None, Tensor | None, Tensor | None]

Compiled = Callable[[Tensor, Tensor, Tensor, Documents | None], tuple[Tensor, Tensor | None]]
"""(stream, attention input, rotary table, documents) to what `KeelLayer.forward` returns."""


@dataclass
class KeelLayerSubmodules(TransformerLayerSubmodules):
    """Megatron-core's submodules, the other norms, and replacements of missing inner norms."""

    outer_norm: ModuleSpec | type = IdentityOp
    branch_norm: ModuleSpec | type = IdentityOp
    inner_vector: ModuleSpec | type = IdentityOp
    no_inner: ModuleSpec | type = IdentityOp


class KeelLayer(TransformerLayer):
    """Block number `layer_number` (from 1, global) under the configured residual rule.

    Differs from Megatron-core's layer in its sums and norms: the stream stays fp32, the
    skip path is scaled, and an outer norm may follow the addition. Its bias-dropout-add slots,
    which would cast the stream down, are not used.

    Args:
        config: Megatron-core's TransformerConfig.
        submodules: a KeelLayerSubmodules.
        model: the model's section of the run's configuration; determines the norms of this block.
        layer_number: number within the stage's chunk, from 1.
        kwargs: further arguments of Megatron-core's TransformerBlock.

    Attributes:
        observer: called with every sum, if set.
        compiled: the compiled block (model/compiled.py), used in training while there is no
            observer; None without kernels.compile.
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
        self.model = model
        self.attention_rule = BLOCKS.sub_layer(2 * block, model)
        self.mlp_rule = BLOCKS.sub_layer(2 * block + 1, model)
        instead = {"vector": submodules.inner_vector, "none": submodules.no_inner}
        if self.attention_rule.inner != "norm":
            self.input_layernorm = self._build(instead[self.attention_rule.inner])
        if self.mlp_rule.inner != "norm":
            self.pre_mlp_layernorm = self._build(instead[self.mlp_rule.inner])
        for rule, module in (self.inner("attention"), self.inner("mlp")):
            if rule.inner != "none":
                module.factor = rule.inner_factor  # type: ignore[assignment]
        self.following: tuple[KeelLayer, ...] = ()
        self.observer: Observer | None = None
        self.compiled: Compiled | None = None
        self.attention_outer_norm = (
            self._build(submodules.outer_norm) if self.attention_rule.outer_norm else None
        )
        self.mlp_outer_norm = (
            self._build(submodules.outer_norm) if self.mlp_rule.outer_norm else None
        )
        self.attention_branch_norm = (
            self._build(submodules.branch_norm) if self.attention_rule.branch_norm else None
        )
        self.mlp_branch_norm = (
            self._build(submodules.branch_norm) if self.mlp_rule.branch_norm else None
        )

        self.attention_streams = self._mix(self.attention_rule, 2 * block)
        self.mlp_streams = self._mix(self.mlp_rule, 2 * block + 1)

    def _mix(self, rule: SubLayer, l: int) -> StreamMix | None:
        return StreamMix(self.config, rule.streams, l) if rule.streams > 1 else None

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
        attention_bias: MicroBatch | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after both sub-layers.

        Args:
            hidden_states: the stream x, fp32 [s, b, h] ([s/TP, b, h] under sequence parallelism);
                n streams are [s, n b, h].
            attention_mask: unused; attention is causal.
            rotary_pos_emb: the table of model/rotary.py.
            context: this block's attention input, if the previous block has computed it together
                with its last norm. Megatron-core's blocks pass it on for cross-attention.
            attention_bias: what else a block needs to know of the micro-batch.

        Returns:
            The stream, with the same shape and type, and the next block's attention input, or None
            after the chunk's last block.
        """
        batch = attention_bias or MicroBatch()
        noise = batch.noise if self.training else None
        x, l = hidden_states, 2 * (self.layer_number - 1)
        if l == 0:
            x = stored(self.model.stream, x, _bits(noise, -1, x))
        z = self.attention_input(x) if context is None else context
        if self.compiled is not None and self.training and self.observer is None:
            return self.compiled(x, z, rotary_pos_emb, batch.documents)
        branch, _bias = self.self_attention(
            z, attention_mask, rotary_pos_emb=rotary_pos_emb, attention_bias=batch.documents
        )
        x, inside = self._join(l, x, branch, (self, "mlp"), noise)
        branch, _bias = self.mlp(inside)
        after = self.following[0] if self.following else None
        return self._join(l + 1, x, branch, None if after is None else (after, "attention"), noise)

    def inner(self, which: SubLayerName) -> tuple[SubLayer, nn.Module]:
        """The columns of a sub-layer of this block, and the module in front of its branch."""
        if which == "attention":
            return self.attention_rule, self.input_layernorm
        return self.mlp_rule, self.pre_mlp_layernorm

    def attention_input(self, x: Tensor) -> Tensor:
        """What the attention reads [s, b, h] of the stream, or of n streams [s, n b, h]."""
        if self.attention_streams is not None:
            x = streams.read(x, self.attention_streams.stream_weight)
        z: Tensor = self.input_layernorm(x)
        return z

    def front(self, which: SubLayerName) -> Front:
        """What is in front of a branch of this block."""
        rule, module = self.inner(which)
        mix = self.attention_streams if which == "attention" else self.mlp_streams
        return rule.inner, weight_of(module), weight_of(mix)

    def after(self, which: SubLayerName) -> tuple[nn.Module | None, ...]:
        """What follows a branch of this block: N_b, N_out and the mix of the streams, or None."""
        if which == "attention":
            return self.attention_branch_norm, self.attention_outer_norm, self.attention_streams
        return self.mlp_branch_norm, self.mlp_outer_norm, self.mlp_streams

    def after_weights(self, which: SubLayerName) -> AfterWeights:
        """The weights of N_b and N_out [h] and the mix, or None."""
        branch, outer, mix = map(weight_of, self.after(which))
        return branch, outer, mix

    def _join(
        self,
        l: int,
        x: Tensor,
        branch: Tensor,
        following: tuple[KeelLayer, SubLayerName] | None,
        noise: Noise | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after sub-layer l (global, from 0), and the following branch's input.

        Where the following branch has an inner norm, that is one kernel (kernels/__init__.py).

        Args:
            l: the sub-layer's global number.
            x: the stream before it.
            branch: F, in the compute type.
            following: the block and sub-layer that the stream enters next; None: unknown.
            noise: rounds the stream stochastically.
        """
        which: SubLayerName = "mlp" if l % 2 else "attention"
        rule, _module = self.inner(which)
        front = None if following is None else following[0].front(following[1])
        observer = None if self.observer is None else self._observed(l, rule)
        return join(
            storing(self.model.stream, scaled_add_norm, _bits(noise, l, x)),
            rule,
            x,
            branch,
            *self.after_weights(which),
            front,
            self.config.layernorm_epsilon,
            self.config.params_dtype,
            observer,
            norm=recomputable_rms_norm if rule.streams > 1 else rms_norm,
            dropout=self.hidden_dropout if self.training else 0.0,
        )

    def _observed(self, l: int, rule: SubLayer) -> Callable[[Tensor, Tensor, Tensor], None]:
        observer = self.observer
        assert observer is not None
        return lambda x, branch, x_new: observer(l, x, branch, rule.alpha, x_new)


def _bits(noise: Noise | None, l: int, x: Tensor) -> Tensor | None:
    return None if noise is None else noise.bits(l, x)


def link(layers: nn.ModuleList) -> None:
    """Link each block of a chunk to the next; not as a submodule, which would be a cycle."""
    for layer, following in itertools.pairwise(layers):
        layer.following = (following,)  # type: ignore[assignment]
