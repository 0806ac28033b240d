"""Configuration of a Keel language model (arXiv 2601.19895) for transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class SubLayer:
    """One sub-layer, attention or FFN: x' = N_out(alpha x + c N_b(F(d G(x))))."""

    alpha: float = 1.0
    """Scale of the skip path."""
    branch_factor: float = 1.0
    """c, factor of the branch's output."""
    inner: str = "none"
    """G, in front of the branch F: `norm` (N_in), `vector` (learned), or `none`."""
    inner_factor: float = 1.0
    """d, factor of G's output."""
    outer_norm: bool = False
    """Whether there is an N_out."""
    head_norms: str = ""
    """Which of query, key and value are normalised, each head by itself: none, qk or qkv."""
    branch_norm: bool = False
    """Whether there is an N_b, of the branch's output."""
    streams: int = 1
    """Number of residual streams (layers_keel.py)."""


def sub_layer(l: int, config: Any) -> SubLayer:
    """Columns of sub-layer l, counted from 0 (even: attention, odd: FFN)."""
    row = _of_rule(l, config)
    if config.qk_norm and l % 2 == 0 and not row.head_norms:
        return replace(row, head_norms="qk")
    return row


def _of_rule(l: int, config: Any) -> SubLayer:
    """The same under `residual` alone."""
    alpha, block = config.alpha, l // 2
    pre_norm, post_norm = SubLayer(inner="norm"), SubLayer(outer_norm=True)
    match config.residual:
        case "keel" if l < 2:
            return SubLayer(inner="norm", outer_norm=l == 1 and config.first_block == "v2")
        case "keel":
            return SubLayer(alpha=alpha, inner="norm", outer_norm=True)
        case "pre_ln":
            return pre_norm
        case "post_ln":
            return post_norm
        case "deepnorm" | "scaled_post_ln":
            return SubLayer(alpha=alpha, outer_norm=True)
        case "scaled_post_ln_beta":
            return SubLayer(alpha=alpha, inner="vector", outer_norm=True)
        case "hybrid_norm":
            return SubLayer(outer_norm=True, head_norms="qkv") if l % 2 == 0 else SubLayer()
        case "mix_ln":
            return post_norm if block < config.num_hidden_layers // 4 else pre_norm
        case "hyper_connections":
            return SubLayer(inner="norm", streams=config.expansion_rate)
        case "peri_ln":
            return SubLayer(inner="norm", branch_norm=True)
        case "layer_norm_scaling":
            return SubLayer(inner="norm", inner_factor=(block + 1) ** -0.5)
        case "complete_p":
            ratio = config.num_hidden_layers / config.base_blocks
            return SubLayer(branch_factor=1.0 / ratio, inner="norm")
    raise ValueError(f"residual: {config.residual!r} is not a rule of this model's code")


class KeelConfig(PreTrainedConfig):
    """Configuration of `KeelForCausalLM`; the fields of Llama's, and those of the residual rule.

    Args:
        num_hidden_layers: blocks of attention + FFN. The paper counts L = 2 x blocks sub-layers.
        residual: the residual rule, see `sub_layer`.
        alpha: scale of the skip path; None: L.
        first_block: norms of Keel's first block. v2: its attention has no outer norm; v1: neither
            its attention nor its FFN has.
        expansion_rate: number of residual streams of hyper-connections.
        embedding_norm: an RMSNorm of the embedding's output.
        base_blocks: blocks of the model that CompleteP scales to this depth.
        final_norm: an RMSNorm between the last block and the output layer.
        qk_norm: an RMSNorm of every query and key head, before their rotation.
    """

    model_type = "keel"
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1024,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 64,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        residual: str = "keel",
        alpha: float | None = None,
        first_block: str = "v2",
        expansion_rate: int = 4,
        embedding_norm: bool = False,
        base_blocks: int = 2,
        final_norm: bool = True,
        qk_norm: bool = False,
        max_position_embeddings: int = 4096,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        attention_dropout: float = 0.0,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.residual = residual
        self.alpha = float(2 * num_hidden_layers if alpha is None else alpha)
        self.first_block = first_block
        self.expansion_rate = expansion_rate
        self.embedding_norm = embedding_norm
        self.base_blocks = base_blocks
        self.final_norm = final_norm
        self.qk_norm = qk_norm
        self.hidden_act = "silu"
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = kwargs.pop("rope_parameters", None) or {
            "rope_type": "default",
            "rope_theta": rope_theta,
        }
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.attention_dropout = attention_dropout
        self.use_cache = use_cache
        kwargs.pop("head_dim", None)
        kwargs.pop("hidden_act", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        sub_layer(0, self)  # an unknown rule is refused here
