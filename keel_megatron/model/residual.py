"""The residual rules: how each sub-layer's branch joins the residual stream.

Sub-layers are numbered l = 0 .. L-1 over the whole model (even: attention, odd: FFN), L = 2 x
blocks. N is an RMSNorm with a learned gain and no bias. Every rule is an instance of

    x_{l+1} = N_out(alpha * x_l + F_l(N_in(x_l)))

with either norm present or absent, so a rule is the table of what each sub-layer has.
"""

from __future__ import annotations

from dataclasses import dataclass

from keel_megatron.config.model import ModelConfig


@dataclass(frozen=True)
class SubLayer:
    """One sub-layer of the general form above."""

    alpha: float = 1.0
    """Scale of the skip path."""
    inner_norm: bool = False
    """N_in, in front of the branch."""
    outer_norm: bool = False
    """N_out, after the addition."""


def keel(l: int, model: ModelConfig) -> SubLayer:
    """Keel (arXiv 2601.19895, sections 3 and 4, version 2); alpha = L unless configured.

    x_1     = x_0 + F_0(N_in(x_0))
    x_2     = N_out(x_1 + F_1(N_in(x_1)))             (first_block v1: without N_out)
    x_{l+1} = N_out(alpha x_l + F_l(N_in(x_l)))       l >= 2
    """
    if l == 0:
        return SubLayer(inner_norm=True)
    if l == 1:
        return SubLayer(inner_norm=True, outer_norm=model.first_block == "v2")
    return SubLayer(alpha=model.skip_scale, inner_norm=True, outer_norm=True)


def pre_ln(l: int, model: ModelConfig) -> SubLayer:  # noqa: ARG001
    """Pre-norm (Xiong et al. 2020, arXiv 2002.04745): x_{l+1} = x_l + F_l(N_in(x_l))."""
    return SubLayer(inner_norm=True)


RULES = {"keel": keel, "pre_ln": pre_ln}


def sub_layer(l: int, model: ModelConfig) -> SubLayer:
    """What `model.residual` says of sub-layer l (from 0, over the whole model)."""
    return RULES[model.residual](l, model)
