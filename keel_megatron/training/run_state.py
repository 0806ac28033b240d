"""The state of a run in a checkpoint; the only place that saves and restores it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from keel_megatron.checkpoint import state
from keel_megatron.checkpoint.saver import Saver
from keel_megatron.checkpoint.state import Position
from keel_megatron.engines.base import Engine


class Stateful(Protocol):
    """A part of the run whose state every checkpoint contains."""

    def state(self) -> Any:
        """The state, the same on every rank, of values that `checkpoint.json_codec` supports."""

    def restore(self, state: Any) -> None:
        """Restore a value of `state`."""


class RunState:
    """Weights, optimizer and generators, the position in the data, and all stateful parts.

    Args:
        engine: has weights and optimizer.
        saver: writes the checkpoints.
        stateful: all other parts in checkpoints, by name.

    Attributes:
        position: steps done and sequences seen.
    """

    def __init__(self, engine: Engine, saver: Saver, stateful: Mapping[str, Stateful]) -> None:
        self.position = Position()
        self.saver = saver
        self._engine = engine
        self._stateful = stateful
        self._saved_step: int | None = None

    def save(self) -> None:
        """Begin a checkpoint of the current position, unless there is one already; collective.

        Raises:
            UserError, DivergedError: as `Saver.save`.
        """
        if not self.is_saved:
            extras = {name: part.state() for name, part in self._stateful.items()}
            self.saver.save(self._engine.state, self.position, extras)
            self._saved_step = self.position.step

    @property
    def is_saved(self) -> bool:
        """Whether the run has a checkpoint of the current position."""
        return self._saved_step == self.position.step

    def continue_from(self, checkpoint: Path) -> None:
        """As `restore`, from a checkpoint of another run: this one has none yet; collective.

        Raises:
            UserError: as `restore`.
        """
        self.restore(checkpoint)
        self._saved_step = None

    def restore(self, checkpoint: Path) -> None:
        """Return to a checkpoint, with all of its state; collective.

        A part that the checkpoint does not contain is not changed.

        Raises:
            UserError: it does not fit this run, or is damaged.
        """
        engine = self._engine
        loaded = state.load(checkpoint, engine.config, engine.runtime, engine.state)
        for name, part in self._stateful.items():
            if name in loaded.extras:
                part.restore(loaded.extras[name])
        self.position = loaded.position
        self._saved_step = loaded.position.step
