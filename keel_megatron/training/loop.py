"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing

from keel_megatron.checkpoint.state import Position
from keel_megatron.data.batches import Batch, Batches
from keel_megatron.data.prefetch import Prefetcher
from keel_megatron.depth.collector import DepthCollector
from keel_megatron.engines.base import Engine
from keel_megatron.errors import DivergedError, UserError
from keel_megatron.evaluation.in_training import Evaluation
from keel_megatron.model.compiled import compile_report
from keel_megatron.runtime import exit_codes
from keel_megatron.tracking.records import EvaluationRecord, ValidationRecord
from keel_megatron.tracking.tracker import Tracker
from keel_megatron.training.garbage import GarbageCollection
from keel_megatron.training.guard import Guard
from keel_megatron.training.learning_rate import learning_rate
from keel_megatron.training.recovery import Inspection, roll_back, what_is_left
from keel_megatron.training.run_state import RunState
from keel_megatron.training.step_record import step_record
from keel_megatron.training.stop import StopRequest

BeforeStep = Callable[[Position, Engine], None]
"""Called before every step with the position of the run; tests inject faults there."""


class Loop:
    """Steps from a position to the end of the run.

    Each step trains on the next sequences, as many as its global batch size, at the step's learning
    rate, unless the guard skips the update, and is reported. Validations, evaluations and
    checkpoints follow at their intervals. A request to stop ends the loop after the step, with a
    checkpoint.

    Args:
        engine: runs the training steps.
        batches: training and validation batches.
        state: the position, saved and restored with everything else.
        guard: checks every step.
        tracker: receives steps, validations and evaluations.
        evaluation: the tasks that are evaluated; None: none.
        mark: called after progress (`cluster.watchdog.Watchdog.mark`).
        before_step: called before every step.

    Attributes:
        validation_loss: the latest validation loss, in nats per token; NaN before the first.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        batches: Batches,
        state: RunState,
        guard: Guard,
        tracker: Tracker,
        evaluation: Evaluation | None = None,
        mark: Callable[[str], None] = lambda _what: None,
        before_step: BeforeStep | None = None,
    ) -> None:
        self._config, self._runtime = engine.config, engine.runtime
        self._engine = engine
        self._batches = batches
        self._state = state
        self._guard = guard
        self._tracker = tracker
        self._evaluation = evaluation
        self._mark = mark
        self._before_step = before_step
        self._asked = False
        self._size = self._config.training.global_batch_size
        self._prefetcher = Prefetcher(batches.train.micro_batches, self._runtime.device)
        self._garbage = GarbageCollection(self._config.training.gc_every)
        self.validation_loss = math.nan

    def run(self, stop: StopRequest) -> int:
        """Train until the last step or a request to stop on any rank.

        Returns:
            The exit code, the same on every rank: 0, or that of the request to stop.

        Raises:
            DivergedError: training has diverged; the pending save is finished.
            UserError: a checkpoint cannot be written, and checkpoint.on_error is stop.
        """
        try:
            with self._garbage.controlled(), closing(self._prefetcher):
                return self._run(stop)
        except DivergedError as error:
            raise self._diverged(error) from None

    def _run(self, stop: StopRequest) -> int:
        state, steps = self._state, self._config.training.steps
        stopping = exit_codes.DONE
        if self._guard.action == "rollback" and not state.is_saved:
            state.save()  # for a rollback before the first checkpoint
        while state.position.step < steps:
            if not self._step(stop):
                continue
            state.saver.poll()
            # Whether any rank is asked to stop came with the step's loss; only the code is agreed
            # upon here, once in a run.
            stopping = self._runtime.max(stop.exit_code) if self._asked else exit_codes.DONE
            last = state.position.step == steps
            if last:
                stopping = exit_codes.DONE  # there is nothing left to stop
            if last or (self._due(self._config.training.validate_every) and not stopping):
                self._validate()
            evaluates = last or self._due(self._config.evaluation.every)
            if evaluates and not stopping and not self._evaluate(stop) and not last:
                stopping = self._runtime.max(stop.exit_code)
            if last or stopping or self._due(self._config.checkpoint.every):
                self._state.save()
            if stopping:
                break
        state.saver.finish()
        if state.saver.failure is not None:
            raise UserError(
                f"the run ends without a checkpoint: {state.saver.failure}",
                reported=not self._runtime.is_main,
            )
        return stopping

    def _diverged(self, error: DivergedError) -> DivergedError:
        """The error, with the checkpoints to resume from; finishes the pending save."""
        text = str(error)
        try:
            self._state.saver.finish()
        except UserError as unsaved:
            text += f"\n{unsaved}"
        left = what_is_left(self._config.training.folder, self._guard.anomaly_step)
        return DivergedError(f"{text}\n{left}", reported=not self._runtime.is_main)

    def _due(self, every: int) -> bool:
        return every > 0 and self._state.position.step % every == 0

    def _step(self, stop: StopRequest) -> bool:
        """One step; False if it ended in a rollback."""
        config, engine, position = self._config, self._engine, self._state.position
        if self._before_step is not None:
            self._before_step(position, engine)
        step, started = position.step + 1, time.perf_counter()
        rate = learning_rate(step, config.training.steps, config.optimizer, config.schedule)
        batches, batch_size = self._batch(position)
        waited = time.perf_counter() - started
        inspection = Inspection(self._guard, engine, self._tracker, batches, step)
        depth = self._depth_collector(step, batch_size)
        result = engine.train_step(batches, len(batches), rate, inspection, depth, stop.__bool__)
        self._asked = result.stop
        profile = None if depth is None else depth.profile(step)
        position = Position(step, position.consumed_samples + batch_size)
        self._state.position = position
        self._mark(f"step {step}")
        if inspection.anomaly is not None and self._guard.action == "rollback":
            self._guard.note_rollback(step, inspection.anomaly)
            roll_back(engine, self._state, self._guard, self._tracker)
            self._mark(f"the rollback to step {self._state.position.step}")
            return False
        self._garbage.after_step(step)
        seconds = time.perf_counter() - started
        if compiled := compile_report(engine.chunks, seconds):
            self._tracker.say(compiled)
        skipped = self._guard.skipped
        self._tracker.step(
            step_record(
                config, self._runtime, position, result, rate, seconds, batch_size, skipped, waited
            )
        )
        if profile is not None:
            self._tracker.depth(profile)
        return True

    def _batch(self, position: Position) -> tuple[list[Batch], int]:
        """The micro-batches of the step after a position, and its global batch size."""
        sizes, consumed = self._config.batch_sizes, position.consumed_samples
        size = sizes.at(consumed)
        if size != self._size:
            self._tracker.say(f"step {position.step + 1}: the global batch size is {size:,}")
        self._size = size
        is_last = position.step + 1 == self._config.training.steps
        following = 0 if is_last else sizes.at(consumed + size)
        return self._prefetcher.take(consumed, size, following), size

    def _depth_collector(self, step: int, batch_size: int) -> DepthCollector | None:
        """Collector of the step's depth profile, at step 1 and every `depth_every` steps."""
        every = self._config.tracking.depth_every
        if every == 0 or (step != 1 and step % every):
            return None
        return DepthCollector(self._engine, batch_size)

    def _validate(self) -> None:
        sets = self._batches.validation
        losses = [self._engine.validate(one.batches, len(one.batches)) for one in sets]
        total = sum(one.weight for one in sets)
        self.validation_loss = sum(
            one.weight / total * loss for one, loss in zip(sets, losses, strict=True)
        )
        position = self._state.position
        self._mark(f"the validation after step {position.step}")
        self._tracker.step(
            ValidationRecord(
                step=position.step,
                validation_loss=self.validation_loss,
                consumed_samples=position.consumed_samples,
                consumed_tokens=position.consumed_samples * self._config.data.seq_length,
                sources={one.name: loss for one, loss in zip(sets, losses, strict=True)}
                if len(sets) > 1
                else {},
            )
        )
        if position.step == self._config.training.steps and not math.isfinite(self.validation_loss):
            # No further step follows in which the guard would see it.
            raise DivergedError(
                f"training has diverged: the last validation loss is {self.validation_loss}, and "
                f"step {position.step} is not saved. Lower optimizer.learning_rate",
                reported=not self._runtime.is_main,
            )

    def _evaluate(self, stop: StopRequest) -> bool:
        """Evaluate the tasks, if there are any; False if a request to stop ended it."""
        if self._evaluation is None:
            return True
        step, started = self._state.position.step, time.perf_counter()
        results = self._evaluation.run(self._engine, stop.__bool__, self._mark)
        self._mark(f"the evaluation after step {step}")
        if results is None:
            self._tracker.say(f"the evaluation after step {step} is skipped: a stop is requested")
            return False
        self._tracker.step(EvaluationRecord(step, results, time.perf_counter() - started))
        return True
