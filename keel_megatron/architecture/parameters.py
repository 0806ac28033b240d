"""Parameter counts, from a model's shape and the table of residual rules."""

from __future__ import annotations

from collections.abc import Iterable

from keel_megatron.architecture.residual import Reader, SubLayer
from keel_megatron.architecture.shape import ModelShape

COUNTS = Reader(
    "the count of parameters",
    (
        "alpha",
        "branch_factor",
        "branch_norm",
        "inner",
        "inner_factor",
        "outer_norm",
        "head_norms",
        "streams",
    ),
)


def parameter_count(model: ModelShape, vocab_size: int) -> int:
    """Weights of the whole model, those of norms included."""
    h, d = model.hidden_size, model.head_dim
    attention = h * d * (2 * model.num_attention_heads + 2 * model.query_groups)
    matrices = attention + 3 * h * model.ffn_hidden_size
    embeddings = vocab_size * h * (1 if model.tie_embeddings else 2)
    vectors = vector_parameters(model, range(model.blocks))
    ends = h * (int(model.embedding_norm) + int(model.final_norm))
    return model.blocks * matrices + embeddings + vectors + ends


def vector_parameters(model: ModelShape, blocks: Iterable[int]) -> int:
    """Norm weights and learned vectors that the residual rule gives some blocks, from 0."""
    rows = (COUNTS.sub_layer(l, model) for block in blocks for l in (2 * block, 2 * block + 1))
    return sum(row_parameters(row, model) for row in rows)


def row_parameters(row: SubLayer, model: ModelShape) -> int:
    """The same of a sub-layer with these columns."""
    whole = int(row.inner != "none") + int(row.branch_norm) + int(row.outer_norm)
    mix = row.streams * (row.streams + 2) if row.streams > 1 else 0
    return whole * model.hidden_size + len(row.head_norms) * model.head_dim + mix
