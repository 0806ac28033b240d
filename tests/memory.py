"""Bytes of the tensors that a block of code makes, by watching torch's operators."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Within it: bytes that live now, most that lived at once, and the largest tensor's.

    Counted are storages that operators allocate, until they are freed; not what existed before,
    what has no data (the device meta), nor what a kernel uses inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._add(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._add(storage, storage.nbytes())
        return result

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        if id(storage) in self._known:
            return
        self._known[id(storage)] = weakref.finalize(storage, self._gone, id(storage), size)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    tensors = (x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and not x.is_meta)
    return (tensor.untyped_storage() for tensor in tensors)
