"""`kernels.cuda_graphs`: the passes through a chunk's blocks as two CUDA graphs.

In deep, narrow models a GPU waits for the host to launch kernels; a graph launches all at once. The
forward pass from the embedding's output to the head's input is one graph, its backward pass another
(torch.cuda.make_graphed_callables). The embedding, the head, the loss, gradient accumulation and
the optimizer are not captured. Steps with a depth profile and validation run without graphs.

megatron-core 0.16.1's own graphs (transformer/cuda_graphs.py, cuda_graph_impl="local") are not
used: they capture each layer, and return gradients only of parameters that the layer holds
(`get_connected_params`). A Keel layer also uses the norm weight of the next block, whose gradient
would be silently lost. Capturing the whole chunk also saves the copies between layers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from keel_megatron.compat.modules import replace_forward
from keel_megatron.errors import UserError
from keel_megatron.model.linear import return_gradient

Forward = Callable[..., Tensor]


def record_blocks(chunks: list[nn.Module], device: torch.device) -> None:
    """Capture a chunk's blocks at the first training pass without a depth profile.

    Args:
        chunks: this rank's chunks; exactly one.
        device: its device.

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
            f"kernels.cuda_graphs: true, but parallel.recompute: auto recomputes {recomputed} "
            "block(s) to fit in memory; set kernels.cuda_graphs to false, or lower "
            "training.micro_batch_size"
        )
    for chunk in chunks:
        for parameter in chunk.decoder.parameters():  # type: ignore[union-attr]
            return_gradient(parameter)
        replace_forward(chunk.decoder, GraphedForward(chunk.decoder))


@contextmanager
def capturable_hooks(wanted: bool) -> Iterator[None]:
    """DDP's gradient hooks, made here, lie on a stream that a capture of a backward pass may join.

    Autograd runs a parameter's hook on the stream on which its accumulator was made, and makes that
    stream wait for the gradient. CUDA refuses that of the default stream while another is captured
    ("operation would make the legacy stream depend on a capturing blocking stream").

    Args:
        wanted: `kernels.cuda_graphs`; without it nothing happens.
    """
    if not wanted:
        yield
        return
    quiet = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if quiet is not None:  # since torch 2.10; here the streams differ on purpose
        quiet(False)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class GraphedForward:
    """A decoder's forward pass that replays captured graphs.

    A step with a depth profile runs eagerly and frees the graphs' memory; the next step captures
    them again.

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
        """See TransformerBlock.forward."""
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
        """Capture both passes; the weights are arguments, so that autograd gets their gradients."""

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
            gc.collect()  # the graphs are in a reference cycle with the class that replays them
            torch.cuda.empty_cache()
