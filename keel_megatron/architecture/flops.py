"""Model FLOPs: the arithmetic of the model, independent of the implementation.

A product of an [m, k] and a [k, n] matrix counts 2 m k n. Causal attention counts the half of the
s x s products that the mask leaves; norms, rotary embedding, SwiGLU's element-wise part and
softmax are not counted, and neither is recomputation.
"""

from __future__ import annotations

from keel_megatron.architecture.shape import ModelShape


def block_forward_flops(model: ModelShape, seq_length: int) -> float:
    """Forward FLOPs of one block (attention + FFN) per token."""
    h, d = model.hidden_size, model.head_dim
    projections = 2.0 * h * d * (2 * model.num_attention_heads + 2 * model.query_groups)
    feed_forward = 2.0 * 3.0 * h * model.ffn_hidden_size
    return projections + attention_score_flops(model, seq_length) + feed_forward


def attention_score_flops(model: ModelShape, seq_length: int) -> float:
    """FLOPs per token of attention scores and values, a part of `block_forward_flops`."""
    # Token t attends to t + 1 keys: (s + 1) / 2 on average, for scores and for values.
    return 2.0 * 2.0 * model.num_attention_heads * model.head_dim * (seq_length + 1) / 2.0


def head_forward_flops(model: ModelShape, vocab_size: int) -> float:
    """Forward FLOPs of the output head per token."""
    return 2.0 * model.hidden_size * vocab_size


def training_flops_per_token(model: ModelShape, seq_length: int, vocab_size: int) -> float:
    """FLOPs of forward and backward per token: the backward pass costs twice the forward one."""
    forward = model.blocks * block_forward_flops(model, seq_length)
    return 3.0 * (forward + head_forward_flops(model, vocab_size))
