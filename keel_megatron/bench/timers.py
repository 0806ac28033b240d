"""Times of the parts of a step's passes, from Megatron-core's timers."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

PASSES = ("forward", "backward", "pipeline messages", "gradient sync", "schedule")
"""Parts of the passes. Pipeline messages include waiting for a neighbour; forward and backward
include tensor-parallel collectives; `schedule` is the rest."""


class PartTimers:
    """Megatron-core's `config.timers`, which its schedules call.

    On CUDA they are events on the current stream, read after the step, without synchronisation.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: dict[str, Any] = {}
        self._spans: list[tuple[str, Any, Any]] = []
        self._host_open: dict[str, float] = {}
        self._host = 0.0
        self.host_seconds = 0.0
        """Host time of the passes at the last `take`: until their last kernel was launched."""

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:  # noqa: ARG002
        """The timer with that name."""
        return _Timer(self, name)

    def start(self, name: str) -> None:
        """Start a timer."""
        self._host_open[name] = time.perf_counter()
        self._open[name] = self._mark()

    def stop(self, name: str) -> None:
        """Stop a timer."""
        self._spans.append((name, self._open.pop(name), self._mark()))
        begun = self._host_open.pop(name)
        if _part_of(name) == "passes":
            self._host += time.perf_counter() - begun

    def take(self) -> dict[str, float]:
        """Times by part since the last call, seconds; `passes` is the total of the passes."""
        self.host_seconds, self._host = self._host, 0.0
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for name, begin, end in self._spans:
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            found[_part_of(name)] += seconds
        self._spans.clear()
        names = ("forward", "backward", "pipeline messages", "gradient sync")
        result = {name: found[name] for name in names}
        # Depending on the schedule, Megatron-core's timer of the passes includes the gradient
        # reduction or not; the remainder is the schedule's own time.
        result["schedule"] = max(0.0, found["passes"] - sum(result.values()))
        return result | {"passes": max(found["passes"], sum(result.values()))}

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True)
class _Timer:
    timers: PartTimers
    name: str

    def start(self, barrier: bool = False) -> None:  # noqa: ARG002
        self.timers.start(self.name)

    def stop(self, barrier: bool = False) -> None:  # noqa: ARG002
        self.timers.stop(self.name)


def _part_of(name: str) -> str:
    """The part to which a Megatron-core timer belongs."""
    if name == "forward-backward":
        return "passes"
    if "send" in name or "recv" in name:
        return "pipeline messages"
    if name in ("forward-compute", "backward-compute"):
        return name.removesuffix("-compute")
    return "gradient sync" if name == "all-grads-sync" else "within it"
