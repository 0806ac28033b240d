"""What a trace of a rank has found, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PARTS = ("build", "step", "depth profile", "validation", "save")
"""Parts of a run that are traced, in order; the model and the engine are built in the first."""
CURVE_POINTS = 2000


@dataclass(frozen=True)
class Part:
    """What one part of the run did on a rank."""

    peak: int
    """Most bytes allocated at once, everything included that was there before."""
    peak_by: dict[str, int]
    """The same by where it was allocated."""
    peak_operator: str
    peak_where: str
    """Function that called the operator."""
    reserved: int
    """Bytes that torch's allocator has taken from the device by the part's end."""
    reserved_expandable: int
    """The same with expandable segments."""
    host_peak: int
    """Bytes of large tensors in the host's memory that the part makes."""
    flops: float
    kernels: dict[str, int]
    """Launches by operator."""
    messages: list[tuple[str, str, int, int]]
    """Operation, group, how many, bytes."""
    waits: dict[str, int]
    """Of the host for the device, by the function that waits."""
    mixed: dict[str, int]
    """Operators with operands on two devices; known of strict traces alone."""

    @property
    def launches(self) -> int:
        """Kernels launched."""
        return sum(self.kernels.values())


@dataclass(frozen=True)
class RankTrace:
    """A trace of one rank."""

    stage: int
    tensor_rank: int
    micro_batches: int
    """Of the traced step."""
    all_micro_batches: int
    """Of a step of the run."""
    parts: dict[str, Part]
    """By name; `step` is without a depth profile."""
    passes: Part
    """Of the step only the micro-batches' passes, without gradients' reduction and the update."""
    planned: int
    """Bytes that the plan says of a step."""
    curve: list[tuple[float, int]]
    """(share of the trace's allocations that are done, bytes allocated)."""
    marks: list[tuple[float, str]]
    """Where on the curve each part begins."""
    seconds: float = field(default=0.0, compare=False)
    """That the trace took."""

    @property
    def worst(self) -> str:
        """The part with the highest peak."""
        return max(self.parts, key=lambda name: self.parts[name].peak)

    @property
    def peak(self) -> int:
        """Most bytes allocated in any part."""
        return self.parts[self.worst].peak

    @property
    def reserved(self) -> int:
        """Most bytes reserved, without expandable segments."""
        return max(part.reserved for part in self.parts.values())

    @property
    def reserved_expandable(self) -> int:
        """Most bytes reserved with expandable segments."""
        return max(part.reserved_expandable for part in self.parts.values())

    @property
    def step_peak(self) -> int:
        """Most bytes allocated in any part but the save."""
        return max(part.peak for name, part in self.parts.items() if name != "save")

    @property
    def deviation(self) -> float:
        """How far the plan's step is above the trace's, relative to it; negative = below."""
        return self.planned / self.step_peak - 1.0

    @property
    def flops(self) -> float:
        """Of a step of the run with all of its micro-batches."""
        return self._whole(self.parts["step"].flops, self.passes.flops)

    @property
    def launches(self) -> float:
        """Kernels of a step of the run."""
        return self._whole(self.parts["step"].launches, self.passes.launches)

    def messages(self) -> list[tuple[str, str, float, float]]:
        """Operation, group, number and bytes of a step of the run."""
        inside = {(what, group): (n, size) for what, group, n, size in self.passes.messages}
        found = []
        for what, group, number, size in self.parts["step"].messages:
            n, bytes_ = inside.get((what, group), (0, 0))
            found.append((what, group, self._whole(number, n), self._whole(size, bytes_)))
        return found

    def _whole(self, step: float, passes: float) -> float:
        return step + passes * (self.all_micro_batches / self.micro_batches - 1.0)

    def as_object(self) -> dict[str, Any]:
        """For a program."""
        return {
            "stage": self.stage,
            "micro_batches": self.micro_batches,
            "planned_step_bytes": self.planned,
            "peak_bytes": self.peak,
            "peak_part": self.worst,
            "peak_operator": self.parts[self.worst].peak_operator,
            "peak_where": self.parts[self.worst].peak_where,
            "reserved_bytes": self.reserved,
            "reserved_expandable_bytes": self.reserved_expandable,
            "plan_above_step": self.deviation,
            "step_flops": self.flops,
            "step_launches": self.launches,
            "step_messages": [
                {"operation": what, "group": group, "count": count, "bytes": size}
                for what, group, count, size in self.messages()
            ],
            "host_waits": {name: part.waits for name, part in self.parts.items()},
            "parts": {
                name: {
                    "peak_bytes": part.peak,
                    "peak_by": part.peak_by,
                    "peak_operator": part.peak_operator,
                    "peak_where": part.peak_where,
                    "reserved_bytes": part.reserved,
                    "reserved_expandable_bytes": part.reserved_expandable,
                    "host_peak_bytes": part.host_peak,
                }
                for name, part in self.parts.items()
            },
            "seconds": self.seconds,
        }


def part_of(name: str) -> str:
    """The part of the run that a phase belongs to."""
    first = name.partition(":")[0]
    inside = {"states": "build", "batches": "step", "gradients": "step", "update": "step"}
    return inside.get(first, first)


def merged(phases: Sequence[Any], reserved: tuple[int, int]) -> Part:
    """A part from its phases (`tracker.Phase`) and what is reserved at its end."""
    fullest = max(phases, key=lambda phase: phase.peak)
    kernels: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    mixed: Counter[str] = Counter()
    messages: dict[tuple[str, str], list[int]] = {}
    for phase in phases:
        kernels += phase.kernels
        waits += phase.waits
        mixed += phase.mixed
        for key, (number, size) in phase.messages.items():
            entry = messages.setdefault(key, [0, 0])
            entry[0] += number
            entry[1] += size
    return Part(
        peak=fullest.peak,
        peak_by=dict(fullest.peak_by),
        peak_operator=fullest.peak_operator,
        peak_where=fullest.peak_where,
        reserved=reserved[0],
        reserved_expandable=reserved[1],
        host_peak=max(phase.host_peak for phase in phases),
        flops=sum(phase.flops for phase in phases),
        kernels=dict(kernels),
        messages=[
            (what, group, entry[0], entry[1]) for (what, group), entry in sorted(messages.items())
        ],
        waits=dict(waits),
        mixed=dict(mixed),
    )


def curve_of(
    events: Sequence[tuple[int, int]], marks: Sequence[tuple[int, str]]
) -> tuple[list[tuple[float, int]], list[tuple[float, str]]]:
    """The memory over a trace's allocations, as few points as a picture needs, and its parts."""
    total = max(len(events), 1)
    width = max(1, total // CURVE_POINTS)
    curve, now, high = [], 0, 0
    for number, (size, _key) in enumerate(events, start=1):
        now += size
        high = max(high, now)
        if number % width == 0 or number == total:
            curve.append((number / total, high))
            high = now
    parts: list[tuple[float, str]] = []
    for at, name in marks:
        if not parts or parts[-1][1] != part_of(name):
            parts.append((at / total, part_of(name)))
    return curve, parts
