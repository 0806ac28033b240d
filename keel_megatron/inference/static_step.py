"""One token as a step of static shapes: on CUDA, one graph a token.

A deep model's token is hundreds of small kernels, and the host launches them more slowly than the
device runs them. A CUDA graph launches them all at once. It repeats what was captured, with the
same shapes at the same addresses, so what changes from token to token is in tensors on the device:
the tokens, and the column's number.

Attention reads a power of two of columns, or the cache's capacity, and hides those that are not
filled; there is a graph for each such extent, captured when it is first needed. The graphs belong
to the cache of one batch of prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keel_megatron.inference.cache import Columns, KeyValueCache, StaticColumn

SMALLEST = 128
"""Fewest columns of a graph, unless the capacity is below."""


def extent_of(length: int, capacity: int) -> int:
    """Columns that the step after `length` columns reads: a power of two, or the capacity."""
    return min(capacity, max(SMALLEST, 1 << length.bit_length()))


class StaticStep:
    """Appends a token to every sequence of a cache, replaying CUDA graphs; on a CPU without them.

    Args:
        forward: logits of tokens [b, 1] at a column; it may not wait for the device.
        cache: filled by a prefill.
    """

    def __init__(
        self, forward: Callable[[Tensor, Columns], Tensor | None], cache: KeyValueCache
    ) -> None:
        self._forward, self._cache = forward, cache
        self._tokens = torch.zeros((cache.batch, 1), dtype=torch.long, device=cache.device)
        self._place = torch.zeros(1, dtype=torch.long, device=cache.device)
        self._recorded: dict[int, Callable[[], Tensor | None]] = {}
        self._pool: Any = None

    def __call__(self, tokens: list[int]) -> Tensor | None:
        """Logits after the tokens [b], which go to the column `cache.length`."""
        self._tokens.copy_(torch.tensor(tokens)[:, None])
        self._place.fill_(self._cache.length)
        extent = extent_of(self._cache.length, self._cache.capacity)
        if extent not in self._recorded:
            on_cuda = self._cache.device.type == "cuda"
            self._recorded[extent] = self._captured(extent) if on_cuda else self.plain(extent)
        return self._recorded[extent]()

    def plain(self, extent: int) -> Callable[[], Tensor | None]:
        """The step over so many columns, not captured."""
        column = StaticColumn(self._cache, self._place, extent)
        return lambda: self._forward(self._tokens, column)

    def _captured(self, extent: int) -> Callable[[], Tensor | None]:
        """The step as a graph; its logits are always the same tensor."""
        step = self.plain(extent)
        # Once before: it loads kernels and makes workspaces, which a capture may not. The column's
        # keys and values are written again by the replay.
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = step()
        self._pool = graph.pool()  # graphs do not run at the same time: they share memory

        def replay() -> Tensor | None:
            graph.replay()
            return logits

        return replay
