"""What training processes leave in a run's spool, and a courier that delivers it."""

from __future__ import annotations

import itertools
import json
import socket
from pathlib import Path
from typing import Any

from keel_megatron.mlflow_delivery.outbox import EVENTS, FOLDER, SpoolWriter
from keel_megatron.mlflow_delivery.target import Target
from keel_megatron.mlflow_delivery.worker import Courier


class Session:
    """What a training process leaves in a run's spool; a second apart each."""

    clock = itertools.count(1_700_000_000_000, 1000)

    def __init__(
        self, run: Any, name: str, back_to: int | None = None, pid: int = 0, earlier: bool = False
    ) -> None:
        self.run = run
        self.folder: Path = run.training.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writer = SpoolWriter(self.folder, EVENTS)
        extra: dict[str, Any] = {} if back_to is None else {"back_to": back_to}
        if earlier:  # as versions did whose starts did not name their place
            kept = json.dumps(Target.of(run).to_json())
            (self.folder / FOLDER / "target.json").write_text(kept)
        else:
            extra["target"] = Target.of(run).to_json()
        place = {"host": socket.gethostname(), "pid": pid, "born": 0.0}
        self.put("start", name=name, **place, **extra)

    def put(self, kind: str, **values: Any) -> None:
        self.time = next(self.clock)
        self.writer.append(kind, time=self.time, **values)

    def losses(self, losses: dict[int, float]) -> None:
        for step, loss in losses.items():
            self.put("metrics", step=step, values={"loss": loss})


def deliver(folder: Path, said: list[str] | None = None, to: str | None = None) -> Courier:
    confirmed = [] if to is None else [to]
    courier = Courier(folder, [].append if said is None else said.append, confirmed=confirmed)
    assert courier.deliver(), courier.problem
    return courier
