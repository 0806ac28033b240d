"""`model`: architecture of the network and its residual rule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from keel_megatron.architecture.residual import RULES, rules_with
from keel_megatron.config.section import Section

Stream = Literal["fp32", "bf16", "bf16_add", "bf16_stochastic"]


def _known_rule(name: Any) -> Any:
    """Check the name against the rule table at validation time, so that tests can add rules."""
    if not isinstance(name, str) or name not in RULES:
        raise PydanticCustomError(
            "unknown_rule", "must be one of {rules}", {"rules": ", ".join(RULES)}
        )
    return name


def _exponents() -> str:
    return ", ".join(f"{RULES[name].alpha_exponent:g} for {name}" for name in rules_with("alpha"))


def _rules_schema(schema: dict[str, Any]) -> None:
    schema["enum"] = list(RULES)


class ModelConfig(Section):
    """Architecture of a decoder-only language model; depth counts blocks of attention + FFN."""

    blocks: int = Field(
        gt=0,
        description=(
            "Number of transformer blocks. A block has two sub-layers: attention and FFN."
        ),
    )
    hidden_size: int = Field(gt=0, description="Width of the residual stream.")
    ffn_hidden_size: int = Field(
        gt=0, description="Inner width of the SwiGLU feed-forward network."
    )
    num_attention_heads: int = Field(
        gt=0, description="Number of query heads. Must divide hidden_size."
    )
    num_query_groups: int | None = Field(
        default=None,
        gt=0,
        description=(
            "Number of key/value heads (grouped-query attention). null: num_attention_heads."
        ),
    )
    residual: Annotated[str, BeforeValidator(_known_rule)] = Field(
        default="keel",
        description=(
            "Residual rule: how a sub-layer's output joins the residual stream "
            "(architecture/residual.py)."
        ),
        json_schema_extra=_rules_schema,
    )
    first_block: Literal["v2", "v1"] = Field(
        default="v2",
        description=(
            "Norms of Keel's first block. v2: the first attention has no outer norm. v1: the "
            "first attention and the first FFN have none. Applies to residual: "
            f"{', '.join(rules_with('first_block'))}."
        ),
    )
    alpha: Literal["auto"] | float = Field(
        default="auto",
        description=(
            "Scale of the skip path. auto: L^p with L = 2 x blocks and p = "
            f"{_exponents()}. Other rules accept only auto."
        ),
    )
    base_blocks: int = Field(
        default=2,
        gt=0,
        description=(
            "Blocks of the model whose learning rate and epsilon are transferred to this depth: "
            "branches are divided by m = blocks / base_blocks, and so is AdamW's epsilon for the "
            f"blocks' parameters. Applies to residual: {', '.join(rules_with('base_blocks'))}."
        ),
    )
    stream: Stream = Field(
        default="fp32",
        description=(
            "Storage type of the residual stream, for studies. fp32: fp32. bf16: sum and norm in "
            "fp32, the stream after each sub-layer rounded to bf16. bf16_add: the sum itself in "
            "bf16. bf16_stochastic: as bf16, with stochastic rounding in training. All but fp32 "
            "round the stream's gradient to bf16, and do not support kernels.compile, "
            "kernels.cuda_graphs and keel export."
        ),
    )
    expansion_rate: int = Field(
        default=4,
        ge=2,
        le=16,
        description=(
            "Number of residual streams. Applies to residual: "
            f"{', '.join(rules_with('expansion_rate'))}."
        ),
    )
    embedding_norm: bool = Field(
        default=False,
        description=(
            "Apply an RMSNorm to the embedding's output. Applies to residual: "
            f"{', '.join(rules_with('embedding_norm'))}."
        ),
    )
    final_norm: bool = Field(
        default=True, description="Apply an RMSNorm between the last block and the output layer."
    )
    tie_embeddings: bool = Field(
        default=False, description="Share one matrix between the embedding and the output layer."
    )
    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout probability of embeddings, sub-layer outputs and attention.",
    )
    norm_epsilon: float = Field(default=1e-5, gt=0.0, description="Epsilon of every RMSNorm.")
    init_std: float = Field(
        default=0.02,
        gt=0.0,
        description=("Standard deviation of the initial weights, N(0, std^2), of every matrix."),
    )
    rope_theta: float = Field(
        default=10000.0, gt=0.0, description="Base of the rotary position embedding."
    )
    qk_norm: bool = Field(
        default=False,
        description=(
            "Normalize each query and key head with an RMSNorm before the rotary embedding "
            "(QK-norm), with one learned weight per block for queries and one for keys. Bounds "
            "attention's logits. Not supported by residual: hybrid_norm, which has such norms."
        ),
    )

    @property
    def sub_layers(self) -> int:
        """Number of attention and FFN sub-layers: 2 x blocks, L in the paper."""
        return 2 * self.blocks

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key/value heads, with the default resolved."""
        return self.num_query_groups or self.num_attention_heads
