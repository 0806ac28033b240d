"""The specs from which Megatron-core builds a chunk of blocks."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from keel_megatron.config.model import ModelConfig
from keel_megatron.model.attention import SdpaAttention, SelfAttention
from keel_megatron.model.layer import KeelLayer, KeelLayerSubmodules
from keel_megatron.model.norm import BranchCast, BranchVector, HeadNorm, RMSNorm
from keel_megatron.model.residual import sub_layer


def local_layer_spec(model: ModelConfig) -> ModuleSpec:
    """A block of torch and Megatron-core alone: SDPA, our norms, Column/RowParallelLinear."""
    head_norm = HeadNorm if sub_layer(0, model).qkv_norm else None
    return ModuleSpec(
        module=KeelLayer,
        params={"model": model},
        submodules=KeelLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SdpaAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            outer_norm=ModuleSpec(module=RMSNorm, params={"output": "stream"}),
            inner_vector=BranchVector,
            no_inner=BranchCast,
        ),
    )


def chunk_spec(model: ModelConfig, blocks: int) -> TransformerBlockSubmodules:
    """The spec of a chunk of `blocks` blocks, with what precedes the head after its last one."""
    return TransformerBlockSubmodules(
        layer_specs=[local_layer_spec(model)] * blocks,
        layer_norm=RMSNorm if model.final_norm else BranchCast,
    )
