"""Parts of a run that only remember what they were asked: for tests without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from keel_megatron.checkpoint.state import Position
from keel_megatron.config.run import RunConfig
from keel_megatron.engines.base import StepResult
from keel_megatron.tracking.records import Record


class Alone:
    """The runtime of a process alone, without a process group."""

    is_main = True
    rank = 0
    device = torch.device("cpu")
    launch = SimpleNamespace(world_size=1, local_rank=0)

    def from_main(self, make: Callable[[], Any]) -> Any:
        return make()

    def any(self, flag: bool) -> bool:
        return flag

    def max(self, value: int) -> int:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass


class FakeEngine:
    """Gives the losses that it was given, step by step; no model.

    Args:
        config: the run.
        losses: of the steps, in order; 1.0 after the last.
    """

    def __init__(self, config: RunConfig, losses: list[float] | None = None) -> None:
        self.config: Any = config
        self.runtime: Any = Alone()
        self.chunks: list[Any] = [SimpleNamespace()]
        self.state: Any = "weights and optimizer"
        self.losses = losses or []
        self.rates: list[float] = []
        self.updates: list[bool] = []
        self.validation_loss = 2.0

    def train_step(
        self, batches: Any, count: int, rate: float, accept: Any, depth: Any, stop: Any
    ) -> StepResult:
        assert depth is None
        result = StepResult(self.losses.pop(0) if self.losses else 1.0, 0.5, stop())
        self.rates.append(rate)
        self.updates.append(accept(result) and result.finite)
        return result

    def validate(self, batches: Any, count: int) -> float:
        return self.validation_loss


class FakeBatches:
    """Batch k is the number k, where all have the same size."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.samples: list[range] = []

    def micro_batches(self, consumed_samples: int, global_batch_size: int) -> Iterator[int]:
        self.read.append(consumed_samples // global_batch_size)
        self.samples.append(range(consumed_samples, consumed_samples + global_batch_size))
        yield self.read[-1]


class FakeSaver:
    """Remembers the positions and the extras of what it was asked to save."""

    def __init__(self) -> None:
        self.saved: list[tuple[Position, dict[str, Any]]] = []
        self.failure: str | None = None
        self.finished = 0
        self.aside: set[int] = set()

    def save(self, _trained: Any, position: Position, extras: dict[str, Any]) -> None:
        self.saved.append((position, extras))

    def poll(self) -> None:
        pass

    def finish(self) -> None:
        self.finished += 1

    def set_aside(self, damaged: Any) -> None:
        self.aside |= set(damaged)


class FakeTracker:
    """Remembers what it was told."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.records: list[Record] = []
        self.artifacts: list[Path] = []
        self.rewound: list[int] = []
        self.tagged: dict[str, str] = {}

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, record: Record) -> None:
        self.records.append(record)

    def artifact(self, path: Path) -> None:
        self.artifacts.append(path)

    def tags(self, tags: Mapping[str, str]) -> None:
        self.tagged.update(tags)

    def rewind(self, step: int) -> None:
        self.rewound.append(step)

    def draw_depth(self, *, ending: bool) -> None:
        pass
