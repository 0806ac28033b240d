"""Model FLOPs: the arithmetic that the mathematics asks for, whatever the program does.

A product of an [m, k] and a [k, n] matrix counts 2 m k n. Causal attention counts the half of the
s x s products that the mask leaves; norms, rotary embedding, SwiGLU's element-wise part and
softmax are left out, as is recomputation.
"""

from __future__ import annotations

from keel_megatron.config.model import ModelConfig


def block_forward_flops(model: ModelConfig, seq_length: int) -> float:
    """Forward FLOPs of one block (attention + FFN) per token."""
    h, d = model.hidden_size, model.head_dim
    projections = 2.0 * h * d * (2 * model.num_attention_heads + 2 * model.query_groups)
    # Token t attends to t + 1 keys: (s + 1) / 2 on average, for scores and for values.
    scores = 2.0 * 2.0 * model.num_attention_heads * d * (seq_length + 1) / 2.0
    feed_forward = 2.0 * 3.0 * h * model.ffn_hidden_size
    return projections + scores + feed_forward


def head_forward_flops(model: ModelConfig, vocab_size: int) -> float:
    """Forward FLOPs of the output head per token."""
    return 2.0 * model.hidden_size * vocab_size


def training_flops_per_token(model: ModelConfig, seq_length: int, vocab_size: int) -> float:
    """FLOPs of forward and backward per token: the backward pass costs twice the forward one."""
    forward = model.blocks * block_forward_flops(model, seq_length)
    return 3.0 * (forward + head_forward_flops(model, vocab_size))


def parameter_count(model: ModelConfig, vocab_size: int) -> int:
    """Weights and gains of the whole model."""
    h, d = model.hidden_size, model.head_dim
    attention = h * d * (2 * model.num_attention_heads + 2 * model.query_groups)
    matrices = attention + 3 * h * model.ffn_hidden_size
    embeddings = vocab_size * h * (1 if model.tie_embeddings else 2)
    return model.blocks * matrices + embeddings + _vector_parameters(model)


def _vector_parameters(model: ModelConfig) -> int:
    """Parameters of the norms (and learned vectors) that the residual rule has."""
    final = model.hidden_size if model.final_norm else 0
    if model.residual == "hybrid_norm":
        return final + model.blocks * (model.hidden_size + 3 * model.head_dim)
    vectors = model.sub_layers
    if model.residual == "keel":
        vectors += model.sub_layers - (1 if model.first_block == "v2" else 2)
    elif model.residual == "scaled_post_ln_beta":
        vectors += model.sub_layers
    return final + vectors * model.hidden_size
