"""The residual rules: how each sub-layer's branch joins the residual stream.

Sub-layers are numbered l = 0 .. L-1 over the whole model (even: attention, odd: FFN), L = 2 x
blocks. N is an RMSNorm with learned weights and no bias. Every rule is an instance of

    x_{l+1} = N_out(alpha * x_l + c * N_b(F_l(d * G(x_l))))

where N_out and N_b may be absent, G is a norm N_in, a learned vector or nothing, and c and d are
factors of the branch's output and input. Hyper-connections have n streams in the place of x_l: G
reads a learned mix of them, and the sum is one of each (kernels/streams.py). So a rule is the table
of what each sub-layer has, and a new rule is one more row of `RULES`: the choices of
`model.residual` and the settings that go with it, the model and its initial weights, the compiled
blocks, the planner's costs and the parameter counts all read the table
(tests/architecture/test_new_rule.py adds one).

They read it through a `Reader`, which lists the columns that its code honours. A sub-layer that
needs another column is refused there: no code can ignore a column it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields, replace
from typing import Literal, Protocol

from keel_megatron.errors import UserError

Inner = Literal["norm", "vector", "none"]
NormedParts = Literal["", "qk", "qkv"]


class Model(Protocol):
    """What the rules read of a model; the section `model` of a configuration has it."""

    @property
    def residual(self) -> str:
        """Name of the rule, a key of `RULES`."""

    @property
    def blocks(self) -> int:
        """Blocks of attention and FFN."""

    @property
    def alpha(self) -> str | float:
        """Scale of the skip path, or `auto`."""

    @property
    def first_block(self) -> str:
        """Version of Keel's first block, v1 or v2."""

    @property
    def qk_norm(self) -> bool:
        """Whether query and key are normalised."""

    @property
    def base_blocks(self) -> int:
        """Blocks of the model whose settings CompleteP transfers to this depth."""

    @property
    def expansion_rate(self) -> int:
        """Number of residual streams of hyper-connections."""


@dataclass(frozen=True)
class SubLayer:
    """One sub-layer of the general form above. A column at its default changes nothing."""

    alpha: float = 1.0
    """Scale of the skip path."""
    branch_factor: float = 1.0
    """c, factor of the branch's output, after N_b."""
    branch_norm: bool = False
    """N_b, of the branch's output before the addition."""
    inner: Inner = "none"
    """G, in front of the branch: N_in, a learned vector (from 1), or nothing."""
    inner_factor: float = 1.0
    """d, factor of G's output; only where G is a norm or a vector, whose weights it multiplies."""
    outer_norm: bool = False
    """N_out, after the addition."""
    head_norms: NormedParts = ""
    """Which of query, key and value are normalised within attention, each head by itself."""
    streams: int = 1
    """n, number of residual streams, the same in all sub-layers."""


SETTINGS: dict[str, str | bool | int] = {
    "alpha": "auto",
    "first_block": "v2",
    "base_blocks": 2,
    "embedding_norm": False,
    "expansion_rate": 4,
}
"""Settings of the section `model` that change some rules only, and their defaults."""


@dataclass(frozen=True)
class Rule:
    """One residual rule."""

    sub_layer: Callable[[int, Model], SubLayer]
    """(l, model) to the columns of sub-layer l."""
    settings: tuple[str, ...] = ()
    """Settings of `SETTINGS` that the rule uses; with it, the others must be at their default."""
    alpha_exponent: float = 0.0
    """p of `model.alpha: auto`, which is L^p."""
    branch_init_exponent: float = 0.0
    """p of the factor L^p of the initial value, output and FFN weights."""
    epsilon_factor: Callable[[Model], float] | None = None
    """Factor of AdamW's epsilon for the blocks' parameters; None: 1."""


@dataclass(frozen=True)
class Reader:
    """A part of the program that reads the table, and the columns that it honours.

    Args:
        path: what the part is called in an error.
        columns: names of the columns.
        inner: values of the column `inner` that are honoured.
    """

    path: str
    columns: Collection[str]
    inner: Collection[str] = ("norm", "vector", "none")

    def sub_layer(self, l: int, model: Model) -> SubLayer:
        """The columns of sub-layer l (from 0, over the whole model) under `model.residual`.

        With `model.qk_norm` attention has the norms of query and key, whatever the rule is.

        Raises:
            UserError: the sub-layer needs a column, or a value of `inner`, that is not honoured.
        """
        row = RULES[model.residual].sub_layer(l, model)
        if model.qk_norm and l % 2 == 0 and not row.head_norms:
            row = replace(row, head_norms="qk")
        for field in fields(row):
            value = getattr(row, field.name)
            if field.default is not MISSING and value == field.default:
                continue
            allowed = field.name in self.columns
            if not allowed or (field.name == "inner" and value not in self.inner):
                raise UserError(
                    f"model.residual: {model.residual} sets {field.name} = {value} in sub-layer "
                    f"{l}, which {self.path} does not support; choose another rule, or add the "
                    "column there (architecture/residual.py)"
                )
        if row.inner_factor != 1.0 and row.inner == "none":
            raise UserError(
                f"model.residual: {model.residual} sets inner_factor in sub-layer {l}, which has "
                "no inner norm or vector; scale the branch with branch_factor instead"
            )
        if row.streams > 1 and (row.outer_norm or row.alpha != 1.0):
            raise UserError(
                f"model.residual: {model.residual} sets outer_norm or alpha in sub-layer {l}, "
                f"which has {row.streams} streams; their sums have neither"
            )
        if row.head_norms and l % 2:
            raise UserError(
                f"model.residual: {model.residual} sets head_norms in sub-layer {l}, an FFN; only "
                "attention (even sub-layers) has a query, a key and a value"
            )
        return row


def keel(l: int, model: Model) -> SubLayer:
    """Keel (arXiv 2601.19895, version 2; v1 differs in the first block); alpha = L by default.

    x_1     = x_0 + F_0(N_in(x_0))
    x_2     = N_out(x_1 + F_1(N_in(x_1)))             (first_block v1: without N_out)
    x_{l+1} = N_out(alpha x_l + F_l(N_in(x_l)))       l >= 2
    """
    if l == 0:
        return SubLayer(inner="norm")
    if l == 1:
        return SubLayer(inner="norm", outer_norm=model.first_block == "v2")
    return SubLayer(alpha=alpha(model), inner="norm", outer_norm=True)


def pre_ln(_l: int, _model: Model) -> SubLayer:
    """Pre-norm (Xiong et al. 2020, arXiv 2002.04745): x_{l+1} = x_l + F_l(N_in(x_l))."""
    return SubLayer(inner="norm")


def post_ln(_l: int, _model: Model) -> SubLayer:
    """Post-norm (Vaswani et al. 2017, arXiv 1706.03762): x_{l+1} = N_out(x_l + F_l(x_l))."""
    return SubLayer(outer_norm=True)


def deepnorm(_l: int, model: Model) -> SubLayer:
    """DeepNorm as the Keel paper compares it: x_{l+1} = N_out(alpha x_l + F_l(x_l)), alpha = L^1/4.

    Value, output and FFN weights start smaller by L^-1/4. Wang et al. 2022 (arXiv 2203.00555) count
    N = L / 2 decoder blocks: alpha = (2N)^1/4, the same, but (8N)^-1/4, which is (4L)^-1/4, for the
    weights.
    """
    return SubLayer(alpha=alpha(model), outer_norm=True)


def hybrid_norm(l: int, _model: Model) -> SubLayer:
    """HybridNorm (Zhuo et al. 2025, arXiv 2503.04598): QKV-norm attention, post-norm FFN.

    Y  = X + Attn_QKVnorm(X)
    X' = N(Y) + FFN(N(Y))

    N(Y) is what both paths of the FFN start from: the outer norm of the attention sub-layer.
    """
    return SubLayer(outer_norm=True, head_norms="qkv") if l % 2 == 0 else SubLayer()


def mix_ln(l: int, model: Model) -> SubLayer:
    """Mix-LN (Li et al. 2024, arXiv 2412.13795): post-norm in the first quarter of the blocks.

    blocks // 4 blocks are post-norm, the rest pre-norm.
    """
    return post_ln(l, model) if l // 2 < model.blocks // 4 else pre_ln(l, model)


def scaled_post_ln(_l: int, model: Model) -> SubLayer:
    """The Keel paper's first attempt, abandoned: x_{l+1} = N_out(alpha x_l + F_l(x_l))."""
    return SubLayer(alpha=alpha(model), outer_norm=True)


def scaled_post_ln_beta(_l: int, model: Model) -> SubLayer:
    """Its second: x_{l+1} = N_out(alpha x_l + F_l(beta * x_l)), beta a learned vector from 1."""
    return SubLayer(alpha=alpha(model), inner="vector", outer_norm=True)


def layer_norm_scaling(l: int, _model: Model) -> SubLayer:
    """LayerNorm scaling (Sun et al. 2025, arXiv 2502.05795): x_{l+1} = x_l + F_l(N_in(x_l) / s).

    s = sqrt(k) with k the block's number from 1, the same for its attention and its FFN, as in the
    authors' code (lmsdss/LayerNorm-Scaling, `layer_index + 1`): the paper's layer is a block.
    """
    return SubLayer(inner="norm", inner_factor=(l // 2 + 1) ** -0.5)


def peri_ln(_l: int, _model: Model) -> SubLayer:
    """Peri-LN (Kim et al. 2025, arXiv 2502.02732): x_{l+1} = x_l + N_b(F_l(N_in(x_l))).

    Known as sandwich norm, too (Gemma 2 and 3). The paper has a norm after the last block
    (`model.final_norm`), and an optional one of the embedding (`model.embedding_norm`).
    """
    return SubLayer(inner="norm", branch_norm=True)


def complete_p(_l: int, model: Model) -> SubLayer:
    """CompleteP (Dey et al. 2025, arXiv 2505.01618): x_{l+1} = x_l + F_l(N_in(x_l)) / m.

    m = blocks / base_blocks, m_L in the paper, whose Table 1 at alpha = 1 and at the width of the
    base model (m_N = 1) corrects with depth:

    - the branch: 1 / m_L^alpha = 1 / m;
    - AdamW's epsilon of the blocks' parameters: 1 / (m_N m_L^alpha) = 1 / m. Gradients there are
      smaller by 1 / m, and so remain as far above epsilon as in the base model. Embedding, final
      norm and head keep it;
    - the learning rate of the blocks' parameters, norms included: m_L^(alpha - 1) / m_N = 1;
    - weight decay (m_N) and initial weights (1 / m_N): 1. No weight starts smaller in a deeper
      model.

    So only branch and epsilon depend on the depth; embeddings and head have no factor either at
    fixed width.
    """
    return SubLayer(branch_factor=1.0 / depth_ratio(model), inner="norm")


def hyper_connections(_l: int, model: Model) -> SubLayer:
    """Static hyper-connections (Zhu et al. 2024, arXiv 2409.19606), n = `model.expansion_rate`.

    x^k_{l+1} = sum_j A_jk x^j_l + b_k F_l(N_in(sum_j a_j x^j_l))       streams j, k = 1 .. n

    a, b and A are learned in every sub-layer and depend on no token. All streams start as the
    embedding, and the final norm is of their sum. At first A is the identity, b is 1 and a picks
    stream l mod n, so that every stream is pre-norm's. The paper's factor sqrt(n) of the initial
    output projections is left out: all rules but DeepNorm start from the same matrices.
    """
    return SubLayer(inner="norm", streams=model.expansion_rate)


RULES: dict[str, Rule] = {
    "keel": Rule(keel, settings=("alpha", "first_block"), alpha_exponent=1.0),
    "pre_ln": Rule(pre_ln),
    "post_ln": Rule(post_ln),
    "deepnorm": Rule(
        deepnorm, settings=("alpha",), alpha_exponent=0.25, branch_init_exponent=-0.25
    ),
    "hybrid_norm": Rule(hybrid_norm),
    "mix_ln": Rule(mix_ln),
    "scaled_post_ln": Rule(scaled_post_ln, settings=("alpha",), alpha_exponent=1.0),
    "scaled_post_ln_beta": Rule(scaled_post_ln_beta, settings=("alpha",), alpha_exponent=1.0),
    "layer_norm_scaling": Rule(layer_norm_scaling),
    "peri_ln": Rule(peri_ln, settings=("embedding_norm",)),
    "complete_p": Rule(
        complete_p,
        settings=("base_blocks",),
        epsilon_factor=lambda model: 1.0 / depth_ratio(model),
    ),
    "hyper_connections": Rule(hyper_connections, settings=("expansion_rate",)),
}
"""By name, which is what `model.residual` says."""


def alpha(model: Model) -> float:
    """`model.alpha`; auto is L to the rule's exponent."""
    if model.alpha != "auto":
        return float(model.alpha)
    return float(2 * model.blocks) ** RULES[model.residual].alpha_exponent


def has_head_norms(model: Model) -> bool:
    """Whether the rule itself normalises query and key, so that it refuses `model.qk_norm`."""
    rule = RULES[model.residual]
    return any(rule.sub_layer(2 * block, model).head_norms for block in range(model.blocks))


def depth_ratio(model: Model) -> float:
    """Blocks / `model.base_blocks`: m of CompleteP."""
    return model.blocks / model.base_blocks


def streams(model: Model) -> int:
    """Number of residual streams under `model.residual`."""
    return RULES[model.residual].sub_layer(0, model).streams


def rules_with(setting: str) -> list[str]:
    """Names of the rules that use a setting of `SETTINGS`."""
    return [name for name, rule in RULES.items() if setting in rule.settings]


def branch_init_scale(model: Model) -> float:
    """Factor of the initial value, output and FFN weights under `model.residual`."""
    return math.pow(2 * model.blocks, RULES[model.residual].branch_init_exponent)


def epsilon_scale(model: Model) -> float:
    """Factor of AdamW's epsilon for the blocks' parameters under `model.residual`."""
    factor = RULES[model.residual].epsilon_factor
    return 1.0 if factor is None else factor(model)
