"""`parallel.recompute: light`: free activations that cheap operators can compute again.

A matrix product keeps its input for the weight's gradient. Where that input is SwiGLU's output or
an inner norm's, the operation that made it has kept its own inputs anyway. So the memory is freed
after the product's forward pass, and the operation computes the same bits again before the
product's backward pass. As in Megatron-core's CheckpointWithoutOutput the tensor itself stays, so
any implementation of the product works: with or without communication, accumulated or returned
gradients.

An operation takes part by two attributes of its autograd function: `recomputable`, the number of
the output, and `recompute(ctx, out)`, which writes that output into `out`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_resize = torch.ops.inductor.resize_storage_bytes_
"""Frees or allocates a tensor's memory; an operator, so that tools which watch operators see it."""


def free_until_backward(x: Tensor, product: Tensor) -> None:
    """Free the memory of x until the gradient of a product that has read it arrives.

    Nothing else may read x. Does nothing outside of training, and for an x that no recomputable
    operation has made: the first of a chunk's blocks may get one from elsewhere.

    Args:
        x: the input of a matrix product.
        product: its output.
    """
    node: Any = x.grad_fn
    operation = getattr(node, "_forward_cls", None)
    if getattr(operation, "recomputable", None) != x.output_nr or not product.requires_grad:
        return
    watched: Any = product
    watched.register_hook(_Refill(x.data, node, operation))
    _resize(x.data, 0)


class _Refill:
    """A hook that computes a freed tensor again, once."""

    def __init__(self, data: Tensor, node: Any, operation: Any) -> None:
        self._held: tuple[Tensor, Any, Any] | None = (data, node, operation)
        self._bytes = data.untyped_storage().nbytes()

    def __call__(self, _gradient: Tensor) -> None:
        if self._held is None:
            return
        data, node, operation = self._held
        self._held = None  # the product's node is the only holder from here on
        _resize(data, self._bytes)
        with torch.no_grad():
            operation.recompute(node, data)
