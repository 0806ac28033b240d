"""The residual rules: how each sub-layer's branch joins the residual stream.

Sub-layers are numbered l = 0 .. L-1 over the whole model (even: attention, odd: FFN), L = 2 x
blocks. N is an RMSNorm with a learned gain and no bias. Every rule is an instance of

    x_{l+1} = N_out(alpha * x_l + F_l(G(x_l)))

where N_out may be absent and G is a norm N_in, a learned vector or nothing, so a rule is the table
of what each sub-layer has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from keel_megatron.config.model import ModelConfig


@dataclass(frozen=True)
class SubLayer:
    """One sub-layer of the general form above."""

    alpha: float = 1.0
    """Scale of the skip path."""
    inner: Literal["norm", "vector", "none"] = "none"
    """G, in front of the branch: N_in, a learned vector (from 1), or nothing."""
    outer_norm: bool = False
    """N_out, after the addition."""
    qkv_norm: bool = False
    """Norms of query, key and value within attention."""


def keel(l: int, model: ModelConfig) -> SubLayer:
    """Keel (arXiv 2601.19895, version 2; v1 differs in the first block); alpha = L by default.

    x_1     = x_0 + F_0(N_in(x_0))
    x_2     = N_out(x_1 + F_1(N_in(x_1)))             (first_block v1: without N_out)
    x_{l+1} = N_out(alpha x_l + F_l(N_in(x_l)))       l >= 2
    """
    if l == 0:
        return SubLayer(inner="norm")
    if l == 1:
        return SubLayer(inner="norm", outer_norm=model.first_block == "v2")
    return SubLayer(alpha=_alpha(model), inner="norm", outer_norm=True)


def pre_ln(_l: int, _model: ModelConfig) -> SubLayer:
    """Pre-norm (Xiong et al. 2020, arXiv 2002.04745): x_{l+1} = x_l + F_l(N_in(x_l))."""
    return SubLayer(inner="norm")


def post_ln(_l: int, _model: ModelConfig) -> SubLayer:
    """Post-norm (Vaswani et al. 2017, arXiv 1706.03762): x_{l+1} = N_out(x_l + F_l(x_l))."""
    return SubLayer(outer_norm=True)


def deepnorm(_l: int, model: ModelConfig) -> SubLayer:
    """DeepNorm as the Keel paper compares it: x_{l+1} = N_out(alpha x_l + F_l(x_l)), alpha = L^1/4.

    Value, output and FFN weights start smaller by `branch_init_scale`. Wang et al. 2022 (arXiv
    2203.00555) count N = L / 2 decoder blocks: alpha = (2N)^1/4, the same, but (8N)^-1/4, which is
    (4L)^-1/4, for the weights.
    """
    return SubLayer(alpha=_alpha(model), outer_norm=True)


def hybrid_norm(l: int, _model: ModelConfig) -> SubLayer:
    """HybridNorm (Zhuo et al. 2025, arXiv 2503.04598): QKV-norm attention, post-norm FFN.

    Y  = X + Attn_QKVnorm(X)
    X' = N(Y) + FFN(N(Y))

    N(Y) is what both paths of the FFN start from: the outer norm of the attention sub-layer.
    """
    return SubLayer(outer_norm=True, qkv_norm=True) if l % 2 == 0 else SubLayer()


def mix_ln(l: int, model: ModelConfig) -> SubLayer:
    """Mix-LN (Li et al. 2024, arXiv 2412.13795): post-norm in the first quarter of the blocks.

    blocks // 4 blocks are post-norm, the rest pre-norm.
    """
    return post_ln(l, model) if l // 2 < model.blocks // 4 else pre_ln(l, model)


def scaled_post_ln(_l: int, model: ModelConfig) -> SubLayer:
    """The Keel paper's first attempt, abandoned: x_{l+1} = N_out(alpha x_l + F_l(x_l))."""
    return SubLayer(alpha=_alpha(model), outer_norm=True)


def scaled_post_ln_beta(_l: int, model: ModelConfig) -> SubLayer:
    """Its second: x_{l+1} = N_out(alpha x_l + F_l(beta * x_l)), beta a learned vector from 1."""
    return SubLayer(alpha=_alpha(model), inner="vector", outer_norm=True)


RULES: dict[str, Callable[[int, ModelConfig], SubLayer]] = {
    "keel": keel,
    "pre_ln": pre_ln,
    "post_ln": post_ln,
    "deepnorm": deepnorm,
    "hybrid_norm": hybrid_norm,
    "mix_ln": mix_ln,
    "scaled_post_ln": scaled_post_ln,
    "scaled_post_ln_beta": scaled_post_ln_beta,
}


def sub_layer(l: int, model: ModelConfig) -> SubLayer:
    """What `model.residual` says of sub-layer l (from 0, over the whole model)."""
    return RULES[model.residual](l, model)


def branch_init_scale(model: ModelConfig) -> float:
    """Factor of the initial value, output and FFN weights: deepnorm's L^-1/4, otherwise 1."""
    return model.sub_layers**-0.25 if model.residual == "deepnorm" else 1.0


def _alpha(model: ModelConfig) -> float:
    """`model.alpha`; auto is L, and L^1/4 for deepnorm."""
    if model.alpha != "auto":
        return float(model.alpha)
    return float(model.sub_layers) ** (0.25 if model.residual == "deepnorm" else 1.0)
