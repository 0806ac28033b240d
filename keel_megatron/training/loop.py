"""The training loop."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from keel_megatron.architecture.flops import training_flops_per_token
from keel_megatron.checkpoint import folder, state
from keel_megatron.checkpoint.resume import newest_good
from keel_megatron.checkpoint.saver import Saver
from keel_megatron.checkpoint.state import Position
from keel_megatron.cluster.watchdog import Watchdog
from keel_megatron.config.errors import DivergedError, UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch, BatchSource
from keel_megatron.depth.collector import DepthCollector
from keel_megatron.engines.base import Engine, StepResult
from keel_megatron.mlflow_delivery.target import remembered_run_id
from keel_megatron.mlflow_delivery.tracker import Tracker
from keel_megatron.model.compiled import compile_report
from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.tracking.records import StepRecord, ValidationRecord
from keel_megatron.training import diagnose
from keel_megatron.training.guard import Finding, Guard
from keel_megatron.training.learning_rate import learning_rate
from keel_megatron.training.stop import StopRequest

BeforeStep = Callable[[Position, Engine], None]
"""Is called before every step with where the run stands; a test makes a fault there."""
MLFLOW_RUN_ID = "mlflow_run_id"
"""Name of the MLflow run's id among a checkpoint's extras."""


class Stateful(Protocol):
    """A part of the run whose state goes into every checkpoint and comes back from it."""

    def state(self) -> Any:
        """Its state, the same on every rank; `checkpoint.plain.to_json` says of what."""

    def restore(self, state: Any) -> None:
        """Go on from what `state` returned."""


@dataclass
class Loop:
    """Steps from a position to the end of the run.

    A step takes the next `global_batch_size` sequences, trains on them at the step's learning
    rate unless the guard objects, and is reported; at their intervals come a validation and a
    checkpoint; a request to stop ends the loop after the step, with a checkpoint, which keeps the
    state of `parts` too.
    """

    config: RunConfig
    runtime: Runtime
    engine: Engine
    batches: BatchSource
    validation: list[Batch]
    tracker: Tracker
    position: Position
    saver: Saver
    guard: Guard
    watchdog: Watchdog
    before_step: BeforeStep | None = None
    saved_step: int | None = None
    parts: dict[str, Stateful] = field(default_factory=dict)
    validation_loss: float = float("nan")

    def run(self, stop: StopRequest) -> int:
        """Train until the last step or until a stop is asked for on any rank.

        Returns:
            The exit code, the same on every rank: 0, or that of the request to stop.

        Raises:
            DivergedError: training has diverged; the checkpoint that was on its way is written.
            UserError: a checkpoint cannot be written, and checkpoint.on_error is stop.
        """
        try:
            return self._run(stop)
        except DivergedError as error:
            raise self._diverged(error) from None

    def _run(self, stop: StopRequest) -> int:
        steps = self.config.training.steps
        stopping = exit_codes.DONE
        if self.guard.action == "rollback" and self.position.step == 0:
            self.save()  # what a rollback before the first checkpoint goes back to
        while self.position.step < steps:
            if not self._step():
                continue
            self.saver.poll()
            stopping = self.runtime.max(stop.exit_code)
            last = self.position.step == steps
            if last:
                stopping = exit_codes.DONE  # there is nothing left to stop
            if last or (self._due(self.config.training.validate_every) and not stopping):
                self._validate()
            if last or stopping or self._due(self.config.checkpoint.every):
                self.save()
            if stopping:
                break
        self.saver.finish()
        if self.saver.failure is not None:
            raise UserError(
                f"the run ends unsaved: {self.saver.failure}", reported=not self.runtime.is_main
            )
        return stopping

    def _diverged(self, error: DivergedError) -> DivergedError:
        """The error, with what there is to go on from once the save on its way is done."""
        text = str(error)
        try:
            self.saver.finish()
        except UserError as unsaved:
            text += f"\n{unsaved}"
        run_folder, first = self.config.training.folder, self.guard.anomaly
        steps = folder.steps(run_folder)
        newest = folder.latest(run_folder)
        text += f"\nnewest checkpoint: {newest or 'none'}"
        before = [step for step in steps if first is not None and step < first]
        if before and before[-1] != steps[-1]:
            text += (
                f"; the newest from before the trouble, which began at step {first}: "
                f"{folder.step_folder(run_folder, before[-1])} (to go on from it, move the later "
                "ones away)"
            )
        return DivergedError(text, reported=not self.runtime.is_main)

    def restore(self, checkpoint: Path) -> None:
        """Go back, or on, to a checkpoint: all of its state, and the position.

        Raises:
            UserError: it does not fit this run, or is not as it was written.
        """
        loaded = state.load(checkpoint, self.config, self.runtime, self.engine.state)
        for name, part in self.parts.items():
            if name in loaded.extras:
                part.restore(loaded.extras[name])
        self.position = loaded.position
        self.saved_step = loaded.position.step
        self.saver.anomaly = self.guard.anomaly

    def save(self) -> None:
        """Begin a checkpoint of the current position, unless there is one already."""
        if self.saved_step == self.position.step:
            return
        extras = {name: part.state() for name, part in self.parts.items()}
        extras[MLFLOW_RUN_ID] = remembered_run_id(self.config.training.folder)
        self.saver.save(self.engine.state, self.position, extras)
        self.saved_step = self.position.step
        self.tracker.draw_depth(ending=False)

    def _due(self, every: int) -> bool:
        return every > 0 and self.position.step % every == 0

    def _step(self) -> bool:
        """One step; False if it ended in a rollback."""
        config, training = self.config, self.config.training
        if self.before_step is not None:
            self.before_step(self.position, self.engine)
        step = self.position.step + 1
        started = time.perf_counter()
        rate = learning_rate(step, training.steps, config.optimizer, config.schedule)
        position, batch_size = self.position, training.global_batch_size
        batches = list(self.batches.micro_batches(position.consumed_samples, batch_size))
        findings: list[Finding] = []

        def accept(result: StepResult) -> bool:
            finding = self.guard.judge(result.loss, result.grad_norm)
            if finding is None:
                self.guard.taken(result.loss, result.grad_norm)
                return True
            findings.append(finding)
            self._report(step, finding, diagnose.describe(self.engine, batches, result.loss))
            self.guard.note(step, finding)
            return self.guard.makes_update(finding)

        depth = self._depth_collector(step)
        result = self.engine.train_step(batches, len(batches), rate, accept, depth)
        profile = None if depth is None else depth.profile(step)
        self.saver.anomaly = self.guard.anomaly
        self.position = Position(step, position.consumed_samples + batch_size)
        self.watchdog.mark(f"step {step}")
        if findings and self.guard.action == "rollback":
            self._roll_back(step, findings[0])
            return False
        seconds = time.perf_counter() - started
        if compiled := compile_report(self.engine.chunks, seconds):
            self.tracker.say(compiled)
        skipped = self.guard.skipped
        self.tracker.step(
            step_record(config, self.runtime, self.position, result, rate, seconds, skipped)
        )
        if profile is not None:
            self.tracker.depth(profile)
        return True

    def _report(self, step: int, finding: Finding, where: str) -> None:
        """Say what the guard has found at a step, and what becomes of its update."""
        action = self.guard.action
        left_out = action != "rollback" and not self.guard.makes_update(finding)
        outcome = ", its update is left out" if left_out else ""
        self.tracker.say(f"guard, step {step} ({action}): {finding}{outcome}; {where}")

    def _roll_back(self, step: int, finding: Finding) -> None:
        """Return to the last checkpoint, and go on with the data after this step's batch.

        All batches since the checkpoint are jumped over: with them the run would come to the same
        step again. Should the run be killed before its next checkpoint, it repeats all this.
        """
        self.guard.roll_back(step, finding)
        before, consumed = self.guard.state(), self.position.consumed_samples
        self.saver.finish()
        run_folder, every = self.config.training.folder, self.config.checkpoint.every
        # Not one that a signal made: whether there was a signal must make no difference.
        found = newest_good(run_folder, self.runtime, multiple_of=every)
        if found.path is None:
            found = newest_good(run_folder, self.runtime)
        if found.path is None:
            raise UserError(
                f"guard.action: rollback finds no checkpoint in {run_folder}",
                reported=not self.runtime.is_main,
            )
        for remark in found.remarks:
            self.tracker.say(remark)
        self.saver.set_aside(found.damaged)
        self.restore(found.path)
        self.guard.outlast(before)
        self.saver.anomaly = self.guard.anomaly
        restored, self.position = self.position, Position(self.position.step, consumed)
        self.tracker.rewind(restored.step)
        self.watchdog.mark(f"the rollback to step {restored.step}")
        self.tracker.say(
            f"guard: back at step {restored.step}; the data goes on after sequence {consumed}"
        )

    def _depth_collector(self, step: int) -> DepthCollector | None:
        """What gathers the step's depth profile: of step 1 and of every `depth_every`-th."""
        every = self.config.tracking.depth_every
        if every == 0 or (step != 1 and step % every):
            return None
        return DepthCollector(self.engine)

    def _validate(self) -> None:
        self.validation_loss = self.engine.validate(self.validation, len(self.validation))
        position = self.position
        self.watchdog.mark(f"the validation after step {position.step}")
        self.tracker.step(
            ValidationRecord(
                step=position.step,
                validation_loss=self.validation_loss,
                consumed_samples=position.consumed_samples,
                consumed_tokens=position.consumed_samples * self.config.data.seq_length,
            )
        )
        if position.step == self.config.training.steps and not math.isfinite(self.validation_loss):
            # The guard cannot speak of it any more: there is no further step.
            raise DivergedError(
                f"training has diverged: the last validation loss is {self.validation_loss}, and "
                f"step {position.step} is not saved. Lower optimizer.learning_rate",
                reported=not self.runtime.is_main,
            )


def step_record(
    config: RunConfig,
    runtime: Runtime,
    position: Position,
    result: StepResult,
    rate: float,
    seconds: float,
    skipped: int = 0,
) -> StepRecord:
    """What is reported of a step.

    Args:
        config: the run.
        runtime: this rank's place.
        position: after the step.
        result: the step's.
        rate: learning rate that it was taken with.
        seconds: its duration.
        skipped: steps so far whose update was left out.
    """
    seq_length = config.data.seq_length
    tokens_per_second = config.training.global_batch_size * seq_length / seconds
    flops = training_flops_per_token(config.model, seq_length, config.data.vocab_size)
    return StepRecord(
        step=position.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate,
        consumed_samples=position.consumed_samples,
        consumed_tokens=position.consumed_samples * seq_length,
        tokens_per_second=tokens_per_second,
        tflops_per_device=tokens_per_second * flops / runtime.launch.world_size / 1e12,
        memory_gb=peak_memory_gb(runtime.device),
        seconds=seconds,
        skipped_steps=skipped,
    )


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this rank in GB (1e9 bytes): allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
