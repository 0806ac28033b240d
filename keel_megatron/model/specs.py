"""Specs from which Megatron-core builds a chunk of blocks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from keel_megatron.architecture.residual import streams
from keel_megatron.config.model import ModelConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.model.attention import SdpaAttention, SelfAttention
from keel_megatron.model.backend import Modules
from keel_megatron.model.layer import BLOCKS, KeelLayer, KeelLayerSubmodules
from keel_megatron.model.linear import ColumnParallelLinear, RowParallelLinear
from keel_megatron.model.mlp import MLP
from keel_megatron.model.norm import BranchCast, BranchVector, HeadNorm, RMSNorm
from keel_megatron.model.streams import MergedCast, MergedNorm


@dataclass(frozen=True)
class Family:
    """A family of modules: same behaviour, different kernels."""

    column_linear: type
    row_linear: type
    core_attention: type


LOCAL = Family(ColumnParallelLinear, RowParallelLinear, SdpaAttention)
"""The family of torch and Megatron-core."""


def transformer_engine() -> Family:
    """Transformer Engine's linear layers and attention, in Megatron-core's wrappers.

    The norms are this project's: statistics and stream are fp32, and they are fused with the sum.
    """
    from megatron.core.extensions import transformer_engine as wrappers

    return Family(
        wrappers.TEColumnParallelLinear,
        wrappers.TERowParallelLinear,
        wrappers.TEDotProductAttention,
    )


def layer_spec(model: ModelConfig, family: Family, block: int) -> ModuleSpec:
    """The spec of block number `block` (from 0) under the residual rule."""
    norms = BLOCKS.sub_layer(2 * block, model).head_norms
    return ModuleSpec(
        module=KeelLayer,
        params={"model": model},
        submodules=KeelLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal, "norms": norms},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=family.column_linear,
                    core_attention=family.core_attention,
                    linear_proj=family.row_linear,
                    q_layernorm=HeadNorm,
                ),
            ),
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=family.column_linear, linear_fc2=family.row_linear
                ),
            ),
            outer_norm=ModuleSpec(module=RMSNorm, params={"output": "stream"}),
            branch_norm=RMSNorm,
            inner_vector=BranchVector,
            no_inner=BranchCast,
        ),
    )


def chunk_spec(config: RunConfig, modules: Modules, blocks: range) -> TransformerBlockSubmodules:
    """The spec of a chunk of blocks (global numbers), and of the final norm if it is the last."""
    model = config.model
    family = transformer_engine() if modules == "transformer_engine" else LOCAL
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(model, family, block) for block in blocks],
        layer_norm=_final_norm(model),
    )


def _final_norm(model: ModelConfig) -> ModuleSpec | type:
    """What follows the last block."""
    n = streams(model)
    if n == 1:
        return RMSNorm if model.final_norm else BranchCast
    return ModuleSpec(module=MergedNorm if model.final_norm else MergedCast, params={"streams": n})
