"""Micro-batches of the next step, read while the current one trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from keel_megatron.data.batches import Batch

Read = Callable[[int, int], Iterable[Batch]]
"""(consumed samples, global batch size) to a step's micro-batches (`BatchSource.micro_batches`)."""


class Prefetcher:
    """Reads one step ahead, in one thread.

    What is read depends on the samples consumed alone. A step that is not the expected one, after a
    resume or a rollback, is read when it is asked for.

    Args:
        read: reads a step; called in the thread, one step at a time.
        device: the run's device; on CUDA the micro-batches are in pinned memory, from where they
            are copied without waiting.
    """

    def __init__(self, read: Read, device: torch.device) -> None:
        self._read = read
        self._pin = device.type == "cuda"
        # A new thread's current device is the first one, whatever the rank's is.
        start: dict[str, Any] = {}
        if self._pin:
            start = {"initializer": torch.cuda.set_device, "initargs": (device,)}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch", **start)
        self._ahead: tuple[tuple[int, int], Future[list[Batch]]] | None = None

    def take(self, consumed: int, size: int, following: int) -> list[Batch]:
        """The step's micro-batches; begins to read the next step's.

        Args:
            consumed: samples before the step.
            size: its global batch size.
            following: that of the next step; 0: no step follows.

        Raises:
            Exception: whatever reading has raised.
        """
        wanted = (consumed, size)
        if self._ahead is None or self._ahead[0] != wanted:
            self._begin(wanted)
        assert self._ahead is not None
        future, self._ahead = self._ahead[1], None
        batches = future.result()
        if following:
            self._begin((consumed + size, following))
        return batches

    def close(self) -> None:
        """End the thread, after the step that it is reading."""
        self._ahead = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _begin(self, wanted: tuple[int, int]) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = wanted, self._thread.submit(self._load, *wanted)

    def _load(self, consumed: int, size: int) -> list[Batch]:
        batches = self._read(consumed, size)
        return [batch.pinned() for batch in batches] if self._pin else list(batches)
