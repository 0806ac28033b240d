"""What the ranks of the checkpoint tests run: whole loops on made-up tokens."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from keel_megatron.checkpoint import manifest
from keel_megatron.checkpoint.megatron_state import MegatronState
from keel_megatron.checkpoint.resume import newest_good
from keel_megatron.checkpoint.saver import Saver
from keel_megatron.checkpoint.sharding import ToSave
from keel_megatron.checkpoint.state import Position
from keel_megatron.cluster.watchdog import Watchdog
from keel_megatron.config import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch, Batches, ValidationSet
from keel_megatron.engines.megatron.engine import MegatronEngine
from keel_megatron.errors import DivergedError
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.tracking.records import CheckpointRecord, Record, StepRecord, ValidationRecord
from keel_megatron.tracking.tracker import Tracker
from keel_megatron.training.guard import Guard
from keel_megatron.training.loop import Loop
from keel_megatron.training.run_state import RunState
from keel_megatron.training.stop import StopRequest
from tests.distributed import run_ranks
from tests.training.ranks import made_up_batches

Sections = dict[str, dict[str, Any]]
Faults = dict[str, Callable[[pytest.MonkeyPatch], None]]


@dataclass(frozen=True)
class MadeUp:
    """A batch source without files: the step decides the tokens."""

    config: RunConfig
    runtime: Runtime

    def micro_batches(self, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        step = consumed_samples // global_batch_size
        return iter(made_up_batches(self.config, self.runtime, step))


class Recorder(Tracker):
    """Keeps what it is told."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config.training.folder, None, None)
        self.records: list[Record] = []
        self.said: list[str] = []

    def step(self, record: StepRecord | ValidationRecord) -> None:
        self.records.append(record)

    def checkpoint(self, record: CheckpointRecord) -> None:
        self.records.append(record)

    def say(self, text: str) -> None:
        self.said.append(text)


class Counter:
    """A part with state: counts what it was asked."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def state(self) -> Any:
        self.seen.append(1 / 3 + len(self.seen))
        return {"seen": tuple(self.seen)}

    def restore(self, state: Any) -> None:
        self.seen = list(state["seen"])


@dataclass(frozen=True)
class Ran:
    """How a run went on a rank."""

    losses: list[tuple[int, float, float]]
    """Step, loss, gradient norm of the steps of this start."""
    digest: str
    """SHA-256 of this rank's weights, masters, moments and step counts."""
    resumed: str | None
    """Name of the checkpoint that it resumed from."""
    remarks: tuple[str, ...]
    said: list[str]
    saves: list[CheckpointRecord]
    counted: list[float] = field(default_factory=list)
    error: str | None = None
    """Message of the UserError that ended it."""
    code: int | None = None
    """What it would have ended with; None after an error."""
    diverged: bool = False
    """Whether that was a DivergedError."""
    records: list[Record] = field(default_factory=list)
    """All that was reported."""

    @property
    def skipped(self) -> list[int]:
        """After each step, how many updates were skipped."""
        return [r.skipped_steps for r in self.records if isinstance(r, StepRecord)]


def run_in_turn(size: int, runs: list[Sections], faults: Faults | None = None) -> list[list[Ran]]:
    """What `run` gives on each of `size` ranks, run by run, all in the same processes.

    Args:
        size: ranks.
        runs: configurations.
        faults: of some runs, by name, what is done to each rank before.
    """
    ranks = run_ranks(size, _run_all, runs, faults or {})
    return [list(run) for run in zip(*ranks, strict=True)]


def _run_all(runs: list[Sections], faults: Faults) -> list[Ran]:
    found = []
    for sections in runs:
        with pytest.MonkeyPatch.context() as patch:
            faults.get(sections["training"]["name"], _no_fault)(patch)
            found.append(run(sections))
    return found


def _no_fault(patch: pytest.MonkeyPatch) -> None:
    pass


def unseen_full(patch: pytest.MonkeyPatch) -> None:
    """As under a quota: the file system says that there is room, and writing fails."""
    real = shutil.disk_usage
    patch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1 << 50))


def quota_of_rank_1(patch: pytest.MonkeyPatch) -> None:
    """Rank 1 runs into its quota in the middle of its second file."""
    write, begun = manifest.write_checked, []

    def limited(path: Path, blocks: Any) -> Any:
        begun.append(path)
        if os.environ["RANK"] == "1" and len(begun) == 2:
            path.write_bytes(bytes(next(iter(blocks))))
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))
        return write(path, blocks)

    patch.setattr(manifest, "write_checked", limited)


def poison(steps: Collection[int], patch: pytest.MonkeyPatch) -> None:
    """The batches of these steps have a loss that is not a number, and so have all gradients."""
    real = MadeUp.micro_batches

    def poisoned(self: MadeUp, consumed_samples: int, global_batch_size: int) -> Iterator[Batch]:
        batches = real(self, consumed_samples, global_batch_size)
        if consumed_samples // global_batch_size + 1 in steps:
            return (replace(batch, loss_mask=batch.loss_mask * torch.nan) for batch in batches)
        return batches

    patch.setattr(MadeUp, "micro_batches", poisoned)


def full_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """No file of this step's checkpoint can be written."""
    write = manifest.write_checked

    def failing(path: Path, blocks: Any) -> Any:
        if path.parent.name == f"step_{step:08d}.partial":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))
        return write(path, blocks)

    patch.setattr(manifest, "write_checked", failing)


def asked_to_stop(patch: pytest.MonkeyPatch) -> None:
    """A request to stop is there from the first step on."""
    patch.setattr("tests.checkpoint.ranks.StopRequest", partial(StopRequest, 0.0))


def no_validation_loss(patch: pytest.MonkeyPatch) -> None:
    """Every validation gives NaN."""
    patch.setattr(MegatronEngine, "validate", lambda *_arguments: float("nan"))


def spoil(name: str, patch: pytest.MonkeyPatch) -> None:
    """On the last rank a master or moment is infinite when the second save begins."""
    real, begun = Saver.save, []

    def spoiled(self: Saver, trained: Any, position: Position, extras: dict[str, Any]) -> None:
        begun.append(position)
        if len(begun) == 2 and self._runtime.rank == self._runtime.launch.world_size - 1:
            content = trained.to_save(copy=True)
            chosen = next(p for p in content.pieces if p.place.key.startswith(name))
            chosen.values[0] = torch.inf
            patch.setattr(trained, "to_save", lambda *, copy: content)
        real(self, trained, position, extras)

    patch.setattr(Saver, "save", spoiled)


def lose_a_piece(patch: pytest.MonkeyPatch) -> None:
    """On the last rank a piece is missing from the second save."""
    real, begun = MegatronState.to_save, []

    def losing(self: MegatronState, *, copy: bool) -> ToSave:
        begun.append(self)
        found = real(self, copy=copy)
        if len(begun) == 2 and os.environ["RANK"] == "1":
            return replace(found, pieces=found.pieces[1:])
        return found

    patch.setattr(MegatronState, "to_save", losing)


def die_while_saving(patch: pytest.MonkeyPatch) -> None:
    """As kill -9 does, when a part of the second checkpoint is written."""
    write, begun = manifest.write_checked, []

    def dying(path: Path, blocks: Any) -> Any:
        begun.append(path)
        if len([path for path in begun if manifest.rank_of(path.name) is not None]) == 2:
            path.write_bytes(bytes(next(iter(blocks))))
            os._exit(9)
        return write(path, blocks)

    patch.setattr(manifest, "write_checked", dying)


def run_and_die(sections: Sections) -> None:
    """`run` in this process, which does not live to its end."""
    with pytest.MonkeyPatch.context() as patch:
        die_while_saving(patch)
        run(sections)


def run(sections: Sections) -> Ran:
    """Train a run to its end, resuming from its newest good checkpoint."""
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        try:
            resume = newest_good(config.training.folder, runtime)
        except UserError as error:
            return Ran([], "", None, (), [], [], error=str(error))
        engine = build_engine(config, runtime, build_model(config, runtime))
        tracker, part, guard = Recorder(config), Counter(), Guard(config.guard)
        error: UserError | None = None
        code = None
        saver = Saver(
            config,
            runtime,
            tracker,
            data={"fingerprint": "made up"},
            damaged=resume.damaged,
            anomaly_step=lambda: guard.anomaly_step,
        )
        state = RunState(engine, saver, {"counter": part, "guard": guard})
        made_up: Any = MadeUp(config, runtime)
        batches = Batches(
            made_up, [ValidationSet("text", 1000, made_up_batches(config, runtime, 99))]
        )
        with Watchdog(runtime, config.training.folder, config.hang_timeout) as watchdog:
            loop = Loop(
                engine=engine,
                batches=batches,
                state=state,
                guard=guard,
                tracker=tracker,
                mark=watchdog.mark,
            )
            try:
                if resume.path is not None:
                    state.restore(resume.path)
                code = loop.run(StopRequest())
            except UserError as caught:
                error = caught
        steps = [record for record in tracker.records if isinstance(record, StepRecord)]
        return Ran(
            losses=[(record.step, record.loss, record.grad_norm) for record in steps],
            digest=digest(engine),
            resumed=resume.path.name if resume.path else None,
            remarks=resume.remarks,
            said=tracker.said,
            saves=[record for record in tracker.records if isinstance(record, CheckpointRecord)],
            counted=part.seen,
            error=None if error is None else str(error),
            code=code,
            diverged=isinstance(error, DivergedError),
            records=tracker.records,
        )


def digest(engine: Any) -> str:
    """SHA-256 of everything that the next step would start from."""
    found = hashlib.sha256()

    def take(name: str, tensor: torch.Tensor) -> None:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())

    for chunk in engine.chunks:
        for name, parameter in chunk.named_parameters():
            take(name, parameter)
    if not hasattr(engine, "optimizer"):
        for name, shard in engine.state.shards():
            take(name, shard)
        found.update(str(engine.state.steps).encode())
        return found.hexdigest()
    for inner in engine.optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):  # the fp32 masters under bf16
                take(f"master {number}", parameter)
                for name, value in sorted(inner.optimizer.state[parameter].items()):
                    take(name, torch.as_tensor(value).reshape(-1))
    shards = engine.state.shards
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            if "momentum_buffer" in shards.names(parameter) and shards.owned(parameter) is not None:
                for name, value in shards.states(parameter).items():  # Muon's
                    take(name, value)
    return found.hexdigest()
