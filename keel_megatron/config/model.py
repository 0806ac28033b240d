"""`model`: the network's shape and its residual rule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from keel_megatron.architecture.residual import RULES
from keel_megatron.config.base import Section


def _known_rule(name: Any) -> Any:
    """A rule of the table, which is looked at when a configuration is read."""
    if not isinstance(name, str) or name not in RULES:
        raise PydanticCustomError(
            "unknown_rule", "must be one of {rules}", {"rules": ", ".join(RULES)}
        )
    return name


def _rules_schema(schema: dict[str, Any]) -> None:
    schema["enum"] = list(RULES)


class ModelConfig(Section):
    """The shape of a decoder-only language model, counted in blocks of attention + FFN."""

    blocks: int = Field(
        gt=0, description="Transformer blocks; each is two sub-layers, attention and FFN."
    )
    hidden_size: int = Field(gt=0, description="Width of the residual stream.")
    ffn_hidden_size: int = Field(gt=0, description="Inner width of the SwiGLU feed-forward.")
    num_attention_heads: int = Field(gt=0, description="Query heads; divides hidden_size.")
    num_query_groups: int | None = Field(
        default=None,
        gt=0,
        description="Key/value heads (grouped-query attention); null = num_attention_heads.",
    )
    residual: Annotated[str, BeforeValidator(_known_rule)] = Field(
        default="keel",
        description="How a branch joins the residual stream (architecture/residual.py).",
        json_schema_extra=_rules_schema,
    )
    first_block: Literal["v2", "v1"] = Field(
        default="v2",
        description=(
            "Keel's first block: v2 drops the outer norm of the first attention only, "
            "v1 that of the first FFN too. Used by residual: keel."
        ),
    )
    alpha: Literal["auto"] | float = Field(
        default="auto",
        description=(
            "Scale of the skip path; auto = the number of sub-layers L = 2 x blocks, and L^0.25 "
            "for deepnorm. The rules without a scale refuse any other value."
        ),
    )
    final_norm: bool = Field(
        default=True, description="A norm between the last block and the output head."
    )
    tie_embeddings: bool = Field(
        default=False, description="Share one matrix between the embedding and the output head."
    )
    dropout: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="Dropout of embeddings, branches and attention."
    )
    norm_epsilon: float = Field(default=1e-5, gt=0.0, description="Epsilon of every RMSNorm.")
    init_std: float = Field(
        default=0.02, gt=0.0, description="Standard deviation of every initial matrix, N(0, std^2)."
    )
    rope_theta: float = Field(default=10000.0, gt=0.0, description="Base of the rotary embedding.")

    @property
    def sub_layers(self) -> int:
        """Attention and FFN sub-layers: 2 x blocks, the paper's L."""
        return 2 * self.blocks

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key/value heads, with the default resolved."""
        return self.num_query_groups or self.num_attention_heads
