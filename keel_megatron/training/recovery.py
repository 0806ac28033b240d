"""Handling of an anomaly: skip the update, roll the run back, or stop with an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.resume import newest_good
from keel_megatron.checkpoint.state import Position
from keel_megatron.data.batches import Batch
from keel_megatron.engines.base import Engine, StepResult
from keel_megatron.errors import UserError
from keel_megatron.tracking.tracker import Tracker
from keel_megatron.training import diagnose
from keel_megatron.training.guard import Anomaly, Guard
from keel_megatron.training.run_state import RunState


@dataclass
class Inspection:
    """The guard's check of one step, which the engine calls between its passes and its update.

    Args:
        guard: checks the step.
        engine: holds the step's gradients when this is called.
        tracker: receives the message about an anomaly.
        batches: the step's micro-batches on this replica.
        step: number of the step.

    Attributes:
        anomaly: the step's anomaly, or None.
    """

    guard: Guard
    engine: Engine
    tracker: Tracker
    batches: Sequence[Batch]
    step: int
    anomaly: Anomaly | None = None

    def __call__(self, result: StepResult) -> bool:
        """Whether to apply the update; the same on every rank, collective.

        Raises:
            DivergedError: too many updates were skipped in a row.
        """
        self.anomaly = self.guard.judge(result.loss, result.grad_norm)
        if self.anomaly is None:
            self.guard.accept(result.loss, result.grad_norm)
            return True
        tolerated = self.guard.tolerates(self.anomaly)
        skipped = self.guard.action != "rollback" and not tolerated
        self.tracker.say(
            f"guard, step {self.step} ({self.guard.action}): {self.anomaly}"
            f"{', its update is skipped' if skipped else ''}; "
            + diagnose.describe(self.engine, self.batches, result.loss)
        )
        self.guard.note(self.step, self.anomaly)
        return tolerated


def roll_back(engine: Engine, state: RunState, guard: Guard, tracker: Tracker) -> None:
    """Return to the newest checkpoint, and continue with the data after the anomalous batch.

    All batches since the checkpoint are skipped: with them the run would reach the same step again.
    A run that is killed before its next checkpoint repeats the rollback. Collective.

    Args:
        engine: has made the passes of the anomalous step.
        state: after that step.
        guard: has counted the rollback.
        tracker: receives the message.

    Raises:
        UserError: there is no good checkpoint.
    """
    config, runtime = engine.config, engine.runtime
    run_folder, consumed = config.training.folder, state.position.consumed_samples
    before = guard.state()
    state.saver.finish()
    # Not one that a signal made: whether there was a signal must make no difference.
    point = newest_good(run_folder, runtime, multiple_of=config.checkpoint.every)
    if point.path is None:
        point = newest_good(run_folder, runtime)
    if point.path is None:
        raise UserError(
            f"guard.action: rollback finds no checkpoint in {run_folder}",
            reported=not runtime.is_main,
        )
    for remark in point.remarks:
        tracker.say(remark)
    state.saver.set_aside(point.damaged)
    state.restore(point.path)
    guard.keep_through_rollback(before)
    step = state.position.step
    state.position = Position(step, consumed)
    tracker.rewind(step)
    tracker.say(f"guard: back at step {step}; the data continues after sequence {consumed}")


def what_is_left(run_folder: Path, anomaly_step: int | None) -> str:
    """The checkpoints from which a diverged run can resume, as lines of its error message.

    Args:
        run_folder: the run's folder.
        anomaly_step: the first anomalous step, if it is known.
    """
    steps = folder.steps(run_folder)
    text = f"newest checkpoint: {folder.latest(run_folder) or 'none'}"
    before = [step for step in steps if anomaly_step is not None and step < anomaly_step]
    if before and before[-1] != steps[-1]:
        text += (
            f"; the newest from before the first anomaly, step {anomaly_step}: "
            f"{folder.step_folder(run_folder, before[-1])} (to resume from it, move the later ones "
            "away)"
        )
    return text
