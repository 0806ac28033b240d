"""Host memory that a save copies the state into, so that training may go on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

_LEAST_SLAB = 1 << 20
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
        self._sizes: list[int] = []
        self._places: list[Tensor] = []
        """Bytes for a tensor of each size."""
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
        """Places for tensors; the same for the same sizes."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        if sizes != self._sizes:
            self._sizes, self._places = sizes, []  # what there was is freed first
            self._places = self._allocated(sizes)
        return [
            place.view(tensor.dtype).view(tensor.shape)
            for place, tensor in zip(self._places, tensors, strict=True)
        ]

    def _allocated(self, sizes: Sequence[int]) -> list[Tensor]:
        """Memory for tensors of these bytes: on CUDA packed into slabs, elsewhere one by one."""
        if not self._is_cuda:
            return [torch.empty(size, dtype=torch.uint8) for size in sizes]
        slabs, places = packed(sizes)
        made = [torch.empty(slab, dtype=torch.uint8, pin_memory=True) for slab in slabs]
        return [
            made[slab][start : start + size]
            for (slab, start), size in zip(places, sizes, strict=True)
        ]


def packed(sizes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Slabs that hold tensors of these bytes, and each tensor's slab and offset.

    torch rounds pinned memory up to a power of two, so slabs are powers of two: each the largest
    that what is left fills, with the largest tensors that fit into it. Beyond the tensors they
    take less than 1 MiB, or than half of a slab that a single tensor needs.
    """
    aligned = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    left = sorted(range(len(sizes)), key=lambda number: -aligned[number])
    slabs: list[int] = []
    places = [(0, 0)] * len(sizes)
    while left:
        rest, largest = sum(aligned[number] for number in left), aligned[left[0]]
        fills, holds = 1 << (max(rest, 1).bit_length() - 1), 1 << max(largest - 1, 0).bit_length()
        slab, begin, others = max(fills, holds, _LEAST_SLAB), 0, []
        for number in left:
            if begin + aligned[number] <= slab:
                places[number] = len(slabs), begin
                begin += aligned[number]
            else:
                others.append(number)
        slabs.append(slab)
        left = others
    return slabs, places
