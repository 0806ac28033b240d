"""What training processes leave in a run's log, and an MLflow worker that delivers it."""

from __future__ import annotations

import itertools
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.mlflow_delivery import earlier_spool
from keel_megatron.mlflow_delivery.delivery import Delivery
from keel_megatron.mlflow_delivery.target import Target
from keel_megatron.tracking.run_log import RunLog


@dataclass(frozen=True)
class Values:
    """A record of any values."""

    step: int
    values: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, **self.values}


class Session:
    """What a training process leaves in a run's log; a second apart each event."""

    clock = itertools.count(1_700_000_000_000, 1000)

    def __init__(
        self, run: Any, name: str, back_to: int | None = None, pid: int = 0, host: str | None = None
    ) -> None:
        self.run = run
        self.folder: Path = run.training.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.time = next(self.clock)
        start = {"name": name, "time": self.time, "target": Target.of(run).to_json()}
        start |= {"host": host or socket.gethostname(), "pid": pid, "born": 0.0}
        extra = {} if back_to is None else {"back_to": back_to}
        self.log = RunLog(self.folder, back_to, start={**start, **extra})

    def put(self, kind: str, **values: Any) -> None:
        self.time = next(self.clock)
        self.log.event(kind, time=self.time, **values)

    def rewind(self, step: int) -> None:
        self.time = next(self.clock)
        self.log._truncate(step, "rewind", {"back_to": step, "time": self.time})

    def record(self, step: int, **values: Any) -> None:
        self.log.write(Values(step, values))

    def losses(self, losses: dict[int, float]) -> None:
        for step, loss in losses.items():
            self.record(step, loss=loss)


class EarlierSession:
    """What a training process of an earlier version left in a run's spool."""

    def __init__(self, run: Any, name: str, back_to: int | None = None) -> None:
        self.folder: Path = run.training.folder
        self.spool = self.folder / earlier_spool.FOLDER
        self.spool.mkdir(parents=True, exist_ok=True)
        self.number = 1 + len(list(self.spool.glob("events.*")))
        # As versions did whose starts did not name their place.
        (self.spool / "target.json").write_text(json.dumps(Target.of(run).to_json()))
        place = {"host": socket.gethostname(), "pid": 0, "born": 0.0}
        extra = {} if back_to is None else {"back_to": back_to}
        self.put("start", name=name, **place, **extra)

    def put(self, kind: str, stream: str = "events", **values: Any) -> None:
        self.time = next(Session.clock)
        line = json.dumps({"kind": kind, "time": self.time} | values)
        with (self.spool / f"{stream}.{self.number:06d}.jsonl").open("a") as file:
            file.write(line + "\n")

    def losses(self, losses: dict[int, float]) -> None:
        for step, loss in losses.items():
            self.put("metrics", step=step, values={"loss": loss})


def deliver(folder: Path, said: list[str] | None = None, to: str | None = None) -> Delivery:
    confirmed = [] if to is None else [to]
    worker = Delivery(folder, [].append if said is None else said.append, confirmed=confirmed)
    assert worker.deliver(), worker.problem
    return worker
