"""Model FLOPs: the arithmetic that the mathematics asks for, whatever the program does.

A product of an [m, k] and a [k, n] matrix counts 2 m k n. Causal attention counts the half of the
s x s products that the mask leaves; norms, rotary embedding, SwiGLU's element-wise part and
softmax are left out, as is recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable

from keel_megatron.architecture.residual import Reader, SubLayer
from keel_megatron.config.model import ModelConfig

COUNTS = Reader(
    "the count of parameters", ("alpha", "branch_factor", "inner", "outer_norm", "qkv_norm")
)


def block_forward_flops(model: ModelConfig, seq_length: int) -> float:
    """Forward FLOPs of one block (attention + FFN) per token."""
    h, d = model.hidden_size, model.head_dim
    projections = 2.0 * h * d * (2 * model.num_attention_heads + 2 * model.query_groups)
    feed_forward = 2.0 * 3.0 * h * model.ffn_hidden_size
    return projections + attention_score_flops(model, seq_length) + feed_forward


def attention_score_flops(model: ModelConfig, seq_length: int) -> float:
    """Of these, the products of queries with keys and of weights with values, per token."""
    # Token t attends to t + 1 keys: (s + 1) / 2 on average, for scores and for values.
    return 2.0 * 2.0 * model.num_attention_heads * model.head_dim * (seq_length + 1) / 2.0


def head_forward_flops(model: ModelConfig, vocab_size: int) -> float:
    """Forward FLOPs of the output head per token."""
    return 2.0 * model.hidden_size * vocab_size


def training_flops_per_token(model: ModelConfig, seq_length: int, vocab_size: int) -> float:
    """FLOPs of forward and backward per token: the backward pass costs twice the forward one."""
    forward = model.blocks * block_forward_flops(model, seq_length)
    return 3.0 * (forward + head_forward_flops(model, vocab_size))


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Weights of the whole model, those of norms included."""
    h, d = model.hidden_size, model.head_dim
    attention = h * d * (2 * model.num_attention_heads + 2 * model.query_groups)
    matrices = attention + 3 * h * model.ffn_hidden_size
    embeddings = vocab_size * h * (1 if model.tie_embeddings else 2)
    vectors = vector_parameters(model, range(model.blocks))
    final = h if model.final_norm else 0
    return model.blocks * matrices + embeddings + vectors + final


def vector_parameters(model: ModelConfig, blocks: Iterable[int]) -> int:
    """Norm weights and learned vectors that the residual rule gives some blocks, from 0."""
    rows = (COUNTS.sub_layer(l, model) for block in blocks for l in (2 * block, 2 * block + 1))
    return sum(row_parameters(row, model) for row in rows)


def row_parameters(row: SubLayer, model: ModelConfig) -> int:
    """The same of a sub-layer with these columns."""
    whole = int(row.inner != "none") + int(row.outer_norm)
    return whole * model.hidden_size + (3 * model.head_dim if row.qkv_norm else 0)
