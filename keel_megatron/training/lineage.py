"""History of a run at a start: its identity, changed settings and learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keel_megatron.checkpoint.folder import step_of
from keel_megatron.checkpoint.json_codec import from_json
from keel_megatron.checkpoint.manifest import CONFIG
from keel_megatron.checkpoint.resume import ResumePoint
from keel_megatron.config.load import flatten, load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.mlflow_delivery.changes import Change, differences
from keel_megatron.mlflow_delivery.run_file import RunFile, take_run_file
from keel_megatron.mlflow_delivery.target import remember_run_id, remembered_run_id
from keel_megatron.tracking.tracker import Tracker
from keel_megatron.training.learning_rate import learning_rate
from keel_megatron.training.origin import config_of
from keel_megatron.training.run_state import Stateful

RUN, CHANGES, MLFLOW_RUN_ID = "run", "changes", "mlflow_run_id"
"""Names in a checkpoint of the run's identity, its changed settings and its MLflow run's id."""
INITIALIZED_FROM = "initialized_from"
"""Name in a checkpoint, and prefix of the tags, of what the run started from."""
_JUMP = 2.0
_OF_A_CONTINUATION = tuple(
    f"training.{name}" for name in ("name", "initialize_from", "keep_optimizer", "keep_position")
)


@dataclass(frozen=True)
class Kept:
    """A part of the run that every checkpoint keeps as it was at the start (`Stateful`)."""

    value: Any

    def state(self) -> Any:
        """The value."""
        return self.value

    def restore(self, state: Any) -> None:
        """Nothing: a rollback within this start does not change it."""


@dataclass(frozen=True)
class MlflowRunId:
    """The id of the run's MLflow run, which is known once the server has answered (`Stateful`)."""

    folder: Path
    """The run's folder, which contains it."""

    def state(self) -> str | None:
        """The id; None while there is none."""
        return remembered_run_id(self.folder)

    def restore(self, state: Any) -> None:
        """Nothing: `accept` decides whether a checkpoint's MLflow run is this run's."""


@dataclass(frozen=True)
class Lineage:
    """Identity and history of a run, from its folder and the checkpoint that it resumes from."""

    run: RunFile
    changes: list[Change] = field(default_factory=list)
    """All changes of settings since step 0, this start's last."""
    lines: list[str] = field(default_factory=list)
    """Messages for the user."""
    resumes: bool = False
    initialized_from: dict[str, Any] | None = None
    """What the run started from (`initialize.Start.record`); None: random weights."""

    def stateful(self, folder: Path) -> dict[str, Stateful]:
        """The parts of a run's identity that checkpoints keep, by name."""
        changes = [change.to_json() for change in self.changes]
        found: dict[str, Stateful] = {
            RUN: Kept(self.run.to_json()),
            CHANGES: Kept(changes),
            MLFLOW_RUN_ID: MlflowRunId(folder),
        }
        if self.initialized_from is not None:
            found[INITIALIZED_FROM] = Kept(self.initialized_from)
        return found

    def report(self, tracker: Tracker) -> None:
        """Show the messages and log the changes."""
        for line in self.lines:
            tracker.say(line)
        if self.run.origin is not None:
            tracker.tags(self.run.origin.tags())
        if self.initialized_from is not None:
            found = self.initialized_from.items()
            tracker.tags({f"{INITIALIZED_FROM}.{k}": str(v) for k, v in found if v is not None})
        if self.resumes:
            tracker.changes(self.changes)


def accept(config: RunConfig, resume: ResumePoint, start: dict[str, Any] | None = None) -> Lineage:
    """Claim the run's folder for an accepted start; on rank 0.

    Args:
        config: the run.
        resume: the checkpoint to resume from.
        start: what a new run starts from (`initialize.Start.record`); None: random weights.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = config.training.folder
    if resume.path is None:
        run, lines = take_run_file(folder)
        if start is not None and start.get("position"):
            lines += _since_origin(config, start)
        return Lineage(run, [], lines, initialized_from=start)
    step = step_of(resume.path)
    extras = from_json(resume.state["extras"])
    run, lines = take_run_file(folder, step, extras.get(RUN))
    _adopt_mlflow_run(config, run, extras)
    saved = load_config(resume.path / CONFIG)
    new = list(differences(step, flatten(saved), flatten(config)))
    changes = [*_changes_in(extras), *new]
    lines += [f"since the checkpoint of step {step}: {change}" for change in new]
    if not new:
        lines.append(f"the settings are those of the checkpoint of step {step}")
    if any(change.setting == "training.initialize_from" for change in new):
        lines.append("training.initialize_from has no effect: the run has a checkpoint of its own")
    lines += learning_rate_lines(saved, config, step)
    return Lineage(run, changes, lines, True, extras.get(INITIALIZED_FROM))


def _since_origin(config: RunConfig, start: dict[str, Any]) -> list[str]:
    """What a run that continues another changes, beside the places of its files."""
    saved, step = config_of(Path(start["path"])), start["step"]
    new = differences(step, flatten(saved), flatten(config))
    found = [change for change in new if change.setting not in _OF_A_CONTINUATION]
    lines = [f"since step {step} of {start['path']}: {change}" for change in found]
    return [*lines, *learning_rate_lines(saved, config, step)]


def learning_rate_lines(saved: RunConfig, config: RunConfig, step: int) -> list[str]:
    """The learning rate before and after resuming, and a warning if it jumps.

    Args:
        saved: the configuration of the checkpoint.
        config: the current configuration.
        step: step of the checkpoint.
    """
    if step >= config.training.steps:
        return []
    planned, now = _rate(saved, step + 1), _rate(config, step + 1)
    before = f"{_rate(saved, step):.4g} at step {step}" if step else "no step yet"
    lines = [f"learning rate: {before}, {now:.4g} at step {step + 1}"]
    if max(planned, now) > _JUMP * min(planned, now):
        stay = (
            f"To keep the checkpoint's rate: optimizer.learning_rate={planned:.4g} "
            "schedule.decay=constant schedule.warmup_steps=0; to"
            if planned
            else "To"
        )
        lines.append(
            f"warning: the learning rate jumps: step {step + 1} uses {now:.4g}; the checkpoint's "
            f"settings would use {planned:.4g}. training.steps, optimizer.learning_rate and "
            f"schedule.* define the whole curve, not the part after this step. {stay} "
            "follow the checkpoint's curve, set these settings back"
        )
    return lines


def _rate(config: RunConfig, step: int) -> float:
    return learning_rate(step, config.training.steps, config.optimizer, config.schedule)


def _changes_in(extras: Mapping[str, Any]) -> list[Change]:
    """The changes recorded in a checkpoint; earlier versions recorded none."""
    with suppress(KeyError, TypeError):
        return [Change.from_json(change) for change in extras.get(CHANGES) or []]
    return []


def _adopt_mlflow_run(config: RunConfig, run: RunFile, extras: Mapping[str, Any]) -> None:
    """Continue the MLflow run that the checkpoint names, if it is this run's."""
    run_id, saved = extras.get(MLFLOW_RUN_ID), RunFile.from_json(extras.get(RUN))
    is_own = run.origin is None if saved is None else saved.id == run.id
    if is_own and run_id is not None and remembered_run_id(config.training.folder) is None:
        remember_run_id(config.training.folder, run_id)
