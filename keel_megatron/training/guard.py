"""Checks every step before its update for non-finite values and spikes.

An update whose loss or gradient norm is not finite is never applied, whatever `guard.action` is: it
is skipped, or the run is rolled back. `guard.action` applies to spikes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from keel_megatron.config.guard import GuardConfig
from keel_megatron.errors import DivergedError

_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation of a normal distribution."""
_LEAST_SPREAD = 0.01
"""Smallest deviation, as a fraction of the median: in a flat window, ripples are not spikes."""


@dataclass(frozen=True)
class Anomaly:
    """An anomaly of one step."""

    quantity: str
    """`loss` or `grad_norm`."""
    value: float
    median: float
    """Median of the window; NaN where the value is not finite."""
    z: float
    """Robust standard deviations above the median; infinite where the value is not finite."""

    @property
    def finite(self) -> bool:
        """Whether it is a spike, not a non-finite value."""
        return math.isfinite(self.value)

    def __str__(self) -> str:
        if not self.finite:
            return f"{self.quantity} is {self.value}"
        return (
            f"{self.quantity} {self.value:.4g} is {self.z:.1f} robust standard deviations above "
            f"its median {self.median:.4g}"
        )


class Guard:
    """The window of accepted steps, and counts of skips and rollbacks.

    Loss and gradient norm are the same on every rank, so the guard is too, without communication.

    Args:
        config: the section guard.
        reported: another rank reports the error that stops the run.

    Attributes:
        skipped: steps so far whose update was skipped.
        rollbacks: steps at which the run was rolled back.
        anomaly_step: the first step of the current series of anomalies, which ends when
            `guard.window` steps were accepted after the latest anomaly. None if there is none.
            Retention keeps the newest checkpoint from before it (checkpoint/folder.py).
    """

    def __init__(self, config: GuardConfig, *, reported: bool = False) -> None:
        self._config = config
        self._reported = reported
        self._windows = {
            quantity: deque[float](maxlen=config.window) for quantity in ("loss", "grad_norm")
        }
        self._in_a_row = 0
        self.skipped = 0
        self.rollbacks: list[int] = []
        self.anomaly_step: int | None = None
        self._accepted = 0
        """Steps accepted since the latest anomaly; counted until the series of anomalies ends."""

    @property
    def action(self) -> str:
        """Action on an anomaly: off, warn, skip or rollback."""
        return self._config.action

    def judge(self, loss: float, grad_norm: float) -> Anomaly | None:
        """The anomaly of a step with this loss and gradient norm, or None.

        With guard.action = off, spikes are not detected.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        for quantity, value in values.items():
            if not math.isfinite(value):
                return Anomaly(quantity, value, math.nan, math.inf)
        if self.action == "off":
            return None
        for quantity, value in values.items():
            window = self._windows[quantity]
            if len(window) < self._config.min_steps:
                continue
            middle, z = robust_z(value, window)
            if z > self._config.threshold:
                return Anomaly(quantity, value, middle, z)
        return None

    def accept(self, loss: float, grad_norm: float) -> None:
        """Add a step without an anomaly to the window."""
        self._in_a_row = 0
        self._windows["loss"].append(loss)
        self._windows["grad_norm"].append(grad_norm)
        if self.anomaly_step is not None:
            self._accepted += 1
            if self._accepted >= self._config.window:
                self.anomaly_step = None

    def tolerates(self, anomaly: Anomaly) -> bool:
        """Whether the update is applied despite the anomaly: a spike that is only reported."""
        return anomaly.finite and self.action == "warn"

    def note(self, step: int, anomaly: Anomaly) -> None:
        """Count a step with this anomaly; for a rollback, `note_rollback` does the rest.

        Raises:
            DivergedError: too many updates were skipped in a row.
        """
        self.anomaly_step = step if self.anomaly_step is None else self.anomaly_step
        self._accepted = 0
        if self.tolerates(anomaly):
            self._in_a_row = 0
        elif self.action != "rollback":
            self._skip(step, anomaly)

    def _skip(self, step: int, anomaly: Anomaly) -> None:
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self._config.limit:
            self._give_up(
                f"step {step} would be skipped update number {self._in_a_row} in a row",
                anomaly,
            )

    def note_rollback(self, step: int, anomaly: Anomaly) -> None:
        """Count a rollback from this step.

        Raises:
            DivergedError: there were too many within `guard.limit_steps`.
        """
        self.rollbacks.append(step)
        lately = [s for s in self.rollbacks if s > step - self._config.limit_steps]
        if len(lately) > self._config.limit:
            within = f"within guard.limit_steps = {self._config.limit_steps}"
            self._give_up(f"step {step} would be rollback number {len(lately)} {within}", anomaly)

    def _give_up(self, what: str, anomaly: Anomaly) -> None:
        raise DivergedError(
            f"training has diverged: {what} ({anomaly}), and guard.limit = {self._config.limit}. "
            "Lower optimizer.learning_rate, raise guard.threshold if these are spikes, or examine "
            "the places that the reports above name",
            reported=self._reported,
        )

    def state(self) -> dict[str, Any]:
        """State of the guard for checkpoints, as numbers and lists."""
        return {
            "windows": {quantity: list(window) for quantity, window in self._windows.items()},
            "in_a_row": self._in_a_row,
            "skipped": self.skipped,
            "rollbacks": list(self.rollbacks),
            "anomaly": self.anomaly_step,
            "accepted": self._accepted,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a value of `state`; a smaller `guard.window` keeps the latest steps."""
        for quantity, values in state["windows"].items():
            self._windows[quantity] = deque(values, maxlen=self._config.window)
        self._in_a_row = state["in_a_row"]
        self.skipped = state["skipped"]
        self.rollbacks = list(state["rollbacks"])
        self.anomaly_step = state.get("anomaly")  # absent in older checkpoints
        self._accepted = state.get("accepted", 0)

    def keep_through_rollback(self, before: dict[str, Any]) -> None:
        """Keep what restoring a checkpoint must not undo, from the state `before` the rollback."""
        self.rollbacks = list(before["rollbacks"])
        self.anomaly_step, self._accepted = before["anomaly"], before["accepted"]


def robust_z(value: float, window: deque[float]) -> tuple[float, float]:
    """The window's median, and a value's distance above it in robust standard deviations."""
    middle = median(window)
    spread = _NORMAL * median(abs(entry - middle) for entry in window)
    spread = max(spread, _LEAST_SPREAD * abs(middle), 1e-12)
    return middle, (value - middle) / spread
