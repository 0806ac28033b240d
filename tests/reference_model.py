"""A plain PyTorch model of every residual rule, written from the papers' equations alone.

Independent of the package: nothing of it is imported. Everything is written out, slowly and
plainly: separate weight matrices, attention with its whole score matrix, RoPE as complex
rotations, one function a residual rule, sub-layer by sub-layer.

Conventions that the papers leave open: RMSNorm has epsilon inside the root and a gain, no bias;
SwiGLU is silu(gate) * up; RoPE turns the pairs (i, i + d/2) (the "rotate half" form); QKV-norm
(HybridNorm) is an RMSNorm over each head, before RoPE, one gain of width d for all query heads, one
for keys, one for values; QK-norm is the same of queries and keys; Mix-LN has blocks // 4 post-norm
blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model's shape and rule."""

    blocks: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    vocab_size: int
    residual: str = "keel"
    first_block: str = "v2"
    alpha: float | None = None
    expansion_rate: int = 4
    embedding_norm: bool = False
    base_blocks: int = 2
    final_norm: bool = True
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    qk_norm: bool = False

    @property
    def L(self) -> int:  # noqa: N802
        return 2 * self.blocks

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Norm(nn.Module):
    """y_i = g_i x_i / sqrt((1/h) sum_j x_j^2 + eps)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.size(-1) + self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention over x [b, s, h]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h, d = shape.hidden_size, shape.head_dim
        self.shape = shape
        self.wq = nn.Parameter(torch.empty(shape.num_attention_heads * d, h))
        self.wk = nn.Parameter(torch.empty(shape.num_query_groups * d, h))
        self.wv = nn.Parameter(torch.empty(shape.num_query_groups * d, h))
        self.wo = nn.Parameter(torch.empty(h, shape.num_attention_heads * d))
        if shape.residual == "hybrid_norm" or shape.qk_norm:
            self.q_norm = Norm(d, shape.norm_epsilon)
            self.k_norm = Norm(d, shape.norm_epsilon)
        if shape.residual == "hybrid_norm":
            self.v_norm = Norm(d, shape.norm_epsilon)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as the scores see them, [b, s, heads, d]."""
        shape = self.shape
        b, s, _h = x.shape
        d = shape.head_dim
        q = (x @ self.wq.T).view(b, s, -1, d)
        k = (x @ self.wk.T).view(b, s, -1, d)
        v = (x @ self.wv.T).view(b, s, -1, d)
        if shape.residual == "hybrid_norm":
            q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        elif shape.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, shape.rope_theta), rotate(k, shape.rope_theta), v

    def forward(self, x: Tensor) -> Tensor:
        shape, s, d = self.shape, x.size(1), self.shape.head_dim
        q, k, v = self.heads(x)
        shared = shape.num_attention_heads // shape.num_query_groups
        heads = []
        for head in range(shape.num_attention_heads):
            group = head // shared
            scores = q[:, :, head] @ k[:, :, group].transpose(1, 2) / d**0.5
            future = torch.ones(s, s, dtype=torch.bool).triu(1)
            weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
            heads.append(weights @ v[:, :, group])
        return torch.cat(heads, dim=-1) @ self.wo.T


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE of x [b, s, heads, d]: x_i + j x_{i + d/2} turned by position * theta^(-2i/d)."""
    s, d = x.size(1), x.size(3)
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.arange(s, dtype=torch.float64)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
    turned = torch.complex(x[..., : d // 2].double(), x[..., d // 2 :].double()) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * (W_up x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h, f = shape.hidden_size, shape.ffn_hidden_size
        self.w_gate = nn.Parameter(torch.empty(f, h))
        self.w_up = nn.Parameter(torch.empty(f, h))
        self.w_down = nn.Parameter(torch.empty(h, f))

    def forward(self, x: Tensor) -> Tensor:
        gate = x @ self.w_gate.T
        return (gate * torch.sigmoid(gate) * (x @ self.w_up.T)) @ self.w_down.T


class SubLayerReference(nn.Module):
    """Sub-layer l: its branch F, and whatever norms its rule asks for by touching them."""

    def __init__(self, shape: Shape, l: int) -> None:
        super().__init__()
        self.shape, self.l = shape, l
        self.F = Attention(shape) if l % 2 == 0 else FeedForward(shape)
        rule, first = shape.residual, l < 2
        post = rule == "mix_ln" and l // 2 < shape.blocks // 4
        inside = (
            "keel",
            "pre_ln",
            "layer_norm_scaling",
            "peri_ln",
            "complete_p",
            "hyper_connections",
        )
        if rule in inside or (rule == "mix_ln" and not post):
            self.N_in = Norm(shape.hidden_size, shape.norm_epsilon)
        if rule == "hyper_connections":
            n = shape.expansion_rate
            self.A_m = nn.Parameter(torch.empty(n))
            self.B = nn.Parameter(torch.empty(n))
            self.A_r = nn.Parameter(torch.empty(n, n))
        if rule == "peri_ln":
            self.N_branch = Norm(shape.hidden_size, shape.norm_epsilon)
        plain = rule == "keel" and (l == 0 or (first and shape.first_block == "v1"))
        scaled = rule in ("keel", "post_ln", "deepnorm", "scaled_post_ln", "scaled_post_ln_beta")
        if (scaled and not plain) or post or (rule == "hybrid_norm" and l % 2 == 1):
            self.N_out = Norm(shape.hidden_size, shape.norm_epsilon)
        if rule == "scaled_post_ln_beta":
            self.beta = nn.Parameter(torch.ones(shape.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return EQUATIONS[self.shape.residual](self, x)


def keel(m: SubLayerReference, x: Tensor) -> Tensor:
    """Keel: sub-layers 0 and 1 have no alpha; 0 (v1: both) has no outer norm."""
    alpha = m.shape.alpha or m.shape.L
    if m.l == 0:
        return x + m.F(m.N_in(x))
    if m.l == 1:
        y = x + m.F(m.N_in(x))
        return y if m.shape.first_block == "v1" else m.N_out(y)
    return m.N_out(alpha * x + m.F(m.N_in(x)))


def pre_ln(m: SubLayerReference, x: Tensor) -> Tensor:
    return x + m.F(m.N_in(x))


def post_ln(m: SubLayerReference, x: Tensor) -> Tensor:
    return m.N_out(x + m.F(x))


def deepnorm(m: SubLayerReference, x: Tensor) -> Tensor:
    return m.N_out((m.shape.alpha or m.shape.L**0.25) * x + m.F(x))


def scaled_post_ln(m: SubLayerReference, x: Tensor) -> Tensor:
    return m.N_out((m.shape.alpha or m.shape.L) * x + m.F(x))


def scaled_post_ln_beta(m: SubLayerReference, x: Tensor) -> Tensor:
    return m.N_out((m.shape.alpha or m.shape.L) * x + m.F(m.beta * x))


def hybrid_norm(m: SubLayerReference, x: Tensor) -> Tensor:
    """Y = X + Attn_QKVnorm(X); X' = N(Y) + FFN(N(Y)), one and the same N(Y)."""
    if m.l % 2 == 0:
        return x + m.F(x)
    return m.N_out(x) + m.F(m.N_out(x))


def mix_ln(m: SubLayerReference, x: Tensor) -> Tensor:
    return post_ln(m, x) if m.l // 2 < m.shape.blocks // 4 else pre_ln(m, x)


def layer_norm_scaling(m: SubLayerReference, x: Tensor) -> Tensor:
    """x + F(N(x) / sqrt(k)), block k from 1."""
    return x + m.F(m.N_in(x) / (1 + m.l // 2) ** 0.5)


def peri_ln(m: SubLayerReference, x: Tensor) -> Tensor:
    return x + m.N_branch(m.F(m.N_in(x)))


def complete_p(m: SubLayerReference, x: Tensor) -> Tensor:
    """CompleteP at alpha = 1: m_L^-1 in front of the branch, m_L = blocks / base_blocks."""
    return x + m.shape.base_blocks / m.shape.blocks * m.F(m.N_in(x))


def hyper_connections(m: SubLayerReference, streams: Tensor) -> Tensor:
    """Of H [n, b, s, h], one row a stream: A_r^T H + B^T F(N(A_m^T H))."""
    n = m.shape.expansion_rate
    x = sum(m.A_m[j] * streams[j] for j in range(n))
    branch = m.F(m.N_in(x))
    return torch.stack(
        [sum(m.A_r[j, k] * streams[j] for j in range(n)) + m.B[k] * branch for k in range(n)]
    )


EQUATIONS: dict[str, Callable[[SubLayerReference, Tensor], Tensor]] = {
    "keel": keel,
    "pre_ln": pre_ln,
    "post_ln": post_ln,
    "deepnorm": deepnorm,
    "hybrid_norm": hybrid_norm,
    "mix_ln": mix_ln,
    "scaled_post_ln": scaled_post_ln,
    "scaled_post_ln_beta": scaled_post_ln_beta,
    "layer_norm_scaling": layer_norm_scaling,
    "peri_ln": peri_ln,
    "complete_p": complete_p,
    "hyper_connections": hyper_connections,
}


class ReferenceModel(nn.Module):
    """Tokens [b, s] to the mean cross entropy of the labels [b, s]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))
        if shape.embedding_norm:
            self.embedding_norm = Norm(shape.hidden_size, shape.norm_epsilon)
        self.sub_layers = nn.ModuleList(SubLayerReference(shape, l) for l in range(shape.L))
        if shape.final_norm:
            self.final_norm = Norm(shape.hidden_size, shape.norm_epsilon)
        self.head = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding[tokens]
        if self.shape.embedding_norm:
            x = self.embedding_norm(x)
        if self.shape.residual == "hyper_connections":
            x = x.expand(self.shape.expansion_rate, *x.shape)
        for sub_layer in self.sub_layers:
            x = sub_layer(x)
        if self.shape.residual == "hyper_connections":
            x = x.sum(0)
        if self.shape.final_norm:
            x = self.final_norm(x)
        return x @ self.head.T

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.losses(tokens, labels)[0]

    def losses(self, tokens: Tensor, labels: Tensor, z: float = 0.0) -> tuple[Tensor, Tensor]:
        """The mean cross entropy, and that plus z times the mean of (log sum_j exp(logit_j))^2."""
        logits = self.logits(tokens)
        log_z = logits.exp().sum(-1).log()
        loss = (log_z - logits.gather(-1, labels[..., None]).squeeze(-1)).mean()
        return loss, loss + z * log_z.square().mean()
