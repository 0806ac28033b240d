"""Host memory that a save copies the state into, so that training may go on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

_SLAB_BYTES = 1 << 28
"""Of a slab. torch rounds pinned memory up to a power of two: one buffer could waste its half."""
_ALIGNMENT = 64


class Staging:
    """Copies tensors to the host's memory, always to the same.

    On CUDA the memory is pinned, and a stream of its own copies while the next forward and backward
    pass compute: `wait` keeps the update behind it, and `ready` the thread that writes. Elsewhere
    the copy is made at once, and both return immediately.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._slabs: list[Tensor] = []
        cuda: Any = torch.cuda  # its streams and events have no types
        self._stream: Any = cuda.Stream(device) if self._is_cuda else None
        self._done: Any = None

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of tensors that nothing but `wait`'s caller changes and that outlive the copying.

        The copies of the call before are overwritten: what reads them must be done.
        """
        copies = self._space(tensors)
        if self._is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream) if self._is_cuda else nullcontext():
            for target, source in zip(copies, tensors, strict=True):
                target.copy_(source.detach(), non_blocking=True)
        if self._is_cuda:
            cuda: Any = torch.cuda
            self._done = cuda.Event(blocking=True)
            self._done.record(self._stream)
        return copies

    def wait(self) -> None:
        """Keep what the current stream does from now on behind the copies; the host goes on."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def ready(self) -> None:
        """Return when the copies are made; from any thread."""
        if self._done is not None:
            self._done.synchronize()

    def _space(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Places for tensors, in slabs that are allocated when there are too few."""
        found, slab, begin = [], 0, 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            while slab < len(self._slabs) and begin + size > self._slabs[slab].numel():
                slab, begin = slab + 1, 0
            if slab == len(self._slabs):
                self._slabs.append(self._slab(size))
            space = self._slabs[slab][begin : begin + size]
            found.append(space.view(tensor.dtype).view(tensor.shape))
            begin += -(-size // _ALIGNMENT) * _ALIGNMENT
        return found

    def _slab(self, size: int) -> Tensor:
        """Memory for a tensor of `size` bytes, and for others after it on CUDA."""
        least = _SLAB_BYTES if self._is_cuda else 0
        return torch.empty(max(size, least), dtype=torch.uint8, pin_memory=self._is_cuda)
