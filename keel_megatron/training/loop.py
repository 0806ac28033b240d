"""The training loop."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from keel_megatron.checkpoint import folder, state
from keel_megatron.checkpoint.state import Position
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch, BatchSource
from keel_megatron.partition.flops import training_flops_per_token
from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.watchdog import Watchdog
from keel_megatron.tracking.records import StepRecord, ValidationRecord
from keel_megatron.tracking.tracker import Tracker
from keel_megatron.training import locate
from keel_megatron.training.engine import MegatronEngine, StepResult
from keel_megatron.training.guard import Finding, Guard
from keel_megatron.training.schedule import learning_rate
from keel_megatron.training.stop import StopRequest

BeforeStep = Callable[[Position, MegatronEngine], None]
"""Is called before every step with where the run stands; a test makes a fault there."""


@dataclass
class Loop:
    """Steps from a position to the end of the run.

    A step takes the next `global_batch_size` sequences, trains on them at the step's learning
    rate unless the guard objects, and is reported; at their intervals come a validation and a
    checkpoint; a request to stop ends the loop after the step, with a checkpoint.
    """

    config: RunConfig
    runtime: Runtime
    engine: MegatronEngine
    batches: BatchSource
    validation: list[Batch]
    tracker: Tracker
    guard: Guard
    watchdog: Watchdog
    position: Position
    saved_step: int | None = None
    before_step: BeforeStep | None = None
    validation_loss: float = float("nan")

    def run(self, stop: StopRequest) -> int:
        """Train until the last step or until a stop is asked for on any rank.

        Returns:
            The exit code, the same on every rank: 0, or that of the request to stop.
        """
        steps = self.config.training.steps
        stopping = exit_codes.DONE
        if self.guard.action == "rollback" and self.position.step == 0:
            self.save()  # what a rollback before the first checkpoint goes back to
        while self.position.step < steps:
            if not self._step():
                continue
            stopping = self.runtime.max(stop.exit_code)
            last = self.position.step == steps
            if last or (self._due(self.config.training.validate_every) and not stopping):
                self._validate()
            if last or stopping or self._due(self.config.checkpoint.every):
                self.save()
            if stopping:
                break
        return stopping

    def restore(self, checkpoint: Path) -> Position:
        """Go back, or on, to a checkpoint."""
        return state.load(
            checkpoint, self.config, self.runtime, self.engine.chunks, self.engine.optimizer
        )

    def save(self) -> None:
        """Write a checkpoint of the current position, unless it is there already."""
        if self.saved_step == self.position.step:
            return
        path = state.save(
            self.config,
            self.runtime,
            self.engine.chunks,
            self.engine.optimizer,
            self.position,
        )
        self.saved_step = self.position.step
        self.watchdog.mark(f"the save of step {self.position.step}")
        self.tracker.say(f"saved {path}")

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
            return self._answer(step, finding, locate.describe(self.engine, batches, result.loss))

        result = self.engine.train_step(batches, len(batches), rate, accept)
        self.position = Position(step, position.consumed_samples + batch_size)
        self.watchdog.mark(f"step {step}")
        if findings and self.guard.action == "rollback":
            self._roll_back(step, findings[0])
            return False
        self.tracker.step(self._record(result, rate, time.perf_counter() - started))
        return True

    def _answer(self, step: int, finding: Finding, where: str) -> bool:
        """Report what the guard has found at a step; whether the step is taken all the same."""
        action = self.guard.action
        self.tracker.say(f"guard, step {step} ({action}): {finding}; {where}")
        if action == "skip":
            self.guard.skip(step, finding)
        return action == "warn"

    def _roll_back(self, step: int, finding: Finding) -> None:
        """Return to the last checkpoint, and go on with the data after this step's batch.

        All batches since the checkpoint are jumped over: with them the run would come to the same
        step again. Should the run be killed before its next checkpoint, it repeats all this.
        """
        self.guard.roll_back(step, finding)
        rollbacks, consumed = self.guard.rollbacks, self.position.consumed_samples
        checkpoint = folder.latest(self.config.training.folder)
        assert checkpoint is not None
        restored = self.restore(checkpoint)
        self.guard.rollbacks = rollbacks
        self.position = Position(restored.step, consumed)
        self.saved_step = restored.step
        self.tracker.rewind(restored.step)
        self.watchdog.mark(f"the rollback to step {restored.step}")
        self.tracker.say(
            f"guard: back at step {restored.step}; the data goes on after sequence {consumed}"
        )

    def _record(self, result: StepResult, rate: float, seconds: float) -> StepRecord:
        config, position = self.config, self.position
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
            tflops_per_device=tokens_per_second * flops / self.runtime.launch.world_size / 1e12,
            memory_gb=peak_memory_gb(self.runtime.device),
            seconds=seconds,
            skipped_steps=self.guard.skipped,
        )

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


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this rank in GB (1e9 bytes): allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
