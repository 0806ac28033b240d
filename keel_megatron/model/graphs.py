"""`kernels.cuda_graphs`: the passes through a chunk's blocks as two CUDA graphs.

Deep and narrow, a GPU waits for the host to launch kernels; a graph launches them all at once. The
forward pass from the embedding's output to the head's input is one graph, its backward pass another
(torch.cuda.make_graphed_callables). Embedding, head, loss, the gradients' sums and the optimizer
stay outside, and so do passes that must be seen or that keep nothing: a step that is observed for
its depth profile, and validation.

Why not megatron-core 0.16.1's own (transformer/cuda_graphs.py, cuda_graph_impl="local"): it records
layer by layer, and returns gradients of the parameters that the layer itself holds
(`get_connected_params`). A Keel layer multiplies with the following block's gain, which is the next
layer's: its gradient would be lost without a word. Recording the chunk as one also saves the copies
from every layer's output to the next one's input.

Never run yet: no GPU was at hand.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from keel_megatron.compat.modules import replace_forward
from keel_megatron.config.errors import UserError

Forward = Callable[..., Tensor]


def record_blocks(chunks: list[nn.Module], device: torch.device) -> None:
    """Let a chunk's blocks be recorded at their first training pass that nobody observes.

    Args:
        chunks: this rank's; one.
        device: where they are.

    Raises:
        UserError: the device has no CUDA graphs, or blocks are recomputed.
    """
    if device.type != "cuda":
        raise UserError(
            "kernels.cuda_graphs: true needs a CUDA device, and this run is on the CPU; set it to "
            "false"
        )
    configs: list[Any] = [chunk.config for chunk in chunks]
    if recomputed := sum(config.recompute_num_layers or 0 for config in configs):
        raise UserError(
            f"kernels.cuda_graphs: true, but parallel.recompute: auto computes {recomputed} "
            "block(s) again for want of memory; set kernels.cuda_graphs to false, or lower "
            "training.micro_batch_size"
        )
    for chunk in chunks:
        replace_forward(chunk.decoder, GraphedForward(chunk.decoder))


class GraphedForward:
    """A decoder's forward that replays what it recorded, in place of Python and launches.

    A step that is observed runs the plain way and drops the graphs, whose memory it needs; the next
    one records again.

    Args:
        decoder: Megatron-core's TransformerBlock over Keel layers.
    """

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._plain: Forward = decoder.forward
        self._graphed: Forward | None = None
        self._parameters: tuple[Tensor, ...] = ()

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor,
        **rest: Any,
    ) -> Tensor:
        """As TransformerBlock.forward."""
        observed = any(layer.observer is not None for layer in self._decoder.layers)
        if observed:
            self._drop()
        if observed or not (self._decoder.training and torch.is_grad_enabled()):
            return self._plain(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **rest)
        if self._graphed is None:
            self._parameters = tuple(self._decoder.parameters())
            self._graphed = self._record(hidden_states, rotary_pos_emb)
        return self._graphed(hidden_states, rotary_pos_emb, *self._parameters)

    def _record(self, hidden_states: Tensor, table: Tensor) -> Forward:
        """Record both passes; the weights are arguments, so that autograd gets their gradients."""

        def forward(x: Tensor, rotary: Tensor, *_parameters: Tensor) -> Tensor:
            return self._plain(x, None, rotary_pos_emb=rotary)

        x = torch.zeros_like(hidden_states, requires_grad=hidden_states.requires_grad)
        arguments = (x, table, *self._parameters)
        graphed: Any = torch.cuda.make_graphed_callables
        recorded: Forward = graphed(forward, arguments)
        return recorded

    def _drop(self) -> None:
        """Free the graphs' memory."""
        if self._graphed is not None:
            self._graphed = None
            gc.collect()  # they are in a cycle with the class that replays them
            torch.cuda.empty_cache()
