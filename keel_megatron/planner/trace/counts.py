"""What single operators cost: FLOPs, and the memory that their kernels take for themselves."""

from __future__ import annotations

from typing import Any

PRODUCTS = {
    "aten.mm": (0, 1),
    "aten.bmm": (0, 1),
    "aten.addmm": (1, 2),
    "aten.addmm_": (1, 2),
    "aten.baddbmm": (1, 2),
}
"""Matrix products, and which of their arguments the factors are."""

FORWARD_ATTENTION = {
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
}
BACKWARD_ATTENTION = {name + "_backward" for name in FORWARD_ATTENTION}

NO_KERNEL = {
    "aten.detach",
    "aten.alias",
    "aten._unsafe_view",
    "aten.lift_fresh",
    "aten.empty",
    "aten.empty_like",
    "aten.new_empty",
    "aten.empty_strided",
    "aten.new_empty_strided",
    "aten.is_same_size",
    "aten.set_",
    "aten._local_scalar_dense",
}
"""Operators that launch nothing on the device; views do not either."""


def flops(name: str, arguments: Any) -> float:
    """FLOPs of a matrix product or of causal attention; 0 of everything else."""
    if name in PRODUCTS:
        first, second = (arguments[place] for place in PRODUCTS[name])
        return 2.0 * first.numel() * second.shape[-1]
    if name in FORWARD_ATTENTION:
        return 2.0 * _scores(arguments[0], arguments[1])
    if name in BACKWARD_ATTENTION:  # the scores again: 5 products for the forward pass's 2
        return 5.0 * _scores(arguments[1], arguments[2])
    return 0.0


def _scores(query: Any, key: Any) -> float:
    """FLOPs of one product of causal attention: half of the s x s scores."""
    b, heads, s, d = query.shape
    return 2.0 * b * heads * s * key.shape[2] * d / 2


def workspace(name: str, arguments: Any) -> int:
    """Bytes that an attention's backward kernel allocates beside its results.

    The gradient of the query is summed in fp32, with a number a row. FlashAttention also writes the
    gradients of key and value once per query head, and sums those of a group afterwards.
    """
    if name not in BACKWARD_ATTENTION:
        return 0
    query, key = arguments[1], arguments[2]
    b, heads, s, d = query.shape
    own = 4 * b * heads * s * (d + 1)
    if "flash" in name and key.shape[1] != heads:
        own += 2 * query.element_size() * b * heads * s * d
    return int(own)
