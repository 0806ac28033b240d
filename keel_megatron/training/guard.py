"""Judges every step before its update: not finite, or a spike; and what to do about it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

from keel_megatron.config.errors import UserError
from keel_megatron.config.guard import GuardConfig

_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation of a normal distribution."""
_LEAST_SPREAD = 0.01
"""Of the median: a window that hardly varies makes no spike of every ripple."""


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step."""

    quantity: str
    """`loss` or `grad_norm`."""
    value: float
    median: float
    """Of the window; NaN where the value is not finite."""
    z: float
    """Robust standard deviations above the median; infinite where the value is not finite."""

    @property
    def finite(self) -> bool:
        """Whether it is a spike rather than no number at all."""
        return math.isfinite(self.value)

    def __str__(self) -> str:
        if not self.finite:
            return f"{self.quantity} is {self.value}"
        return (
            f"{self.quantity} {self.value:.4g} is {self.z:.1f} robust standard deviations above "
            f"its median {self.median:.4g}"
        )


class Guard:
    """The window of accepted steps, and how often the guard has acted.

    Loss and gradient norm are the same on every rank, and so is all of this: nothing is exchanged.

    Args:
        config: its settings.
        reported: another rank says what ends the run.

    Attributes:
        skipped: steps whose update was left out so far in the run.
        rollbacks: steps at which the run was taken back.
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

    @property
    def action(self) -> str:
        """What is done about a finding: off, warn, skip or rollback."""
        return self._config.action

    def judge(self, loss: float, grad_norm: float) -> Finding | None:
        """What is wrong with a step of this loss and gradient norm, if anything."""
        if self.action == "off":
            return None
        values = {"loss": loss, "grad_norm": grad_norm}
        for quantity, value in values.items():
            if not math.isfinite(value):
                return Finding(quantity, value, math.nan, math.inf)
        for quantity, value in values.items():
            window = self._windows[quantity]
            if len(window) < self._config.min_steps:
                continue
            middle, z = robust_z(value, window)
            if z > self._config.threshold:
                return Finding(quantity, value, middle, z)
        return None

    def taken(self, loss: float, grad_norm: float) -> None:
        """The step was taken: it belongs to the window from now on, if it is finite."""
        self._in_a_row = 0
        if self.action == "off":
            return
        for quantity, value in (("loss", loss), ("grad_norm", grad_norm)):
            if math.isfinite(value):
                self._windows[quantity].append(value)

    def skip(self, step: int, finding: Finding) -> None:
        """The step's update is left out.

        Raises:
            UserError: that happened too often in a row.
        """
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > self._config.limit:
            self._give_up(f"step {step} would be skip number {self._in_a_row} in a row", finding)

    def roll_back(self, step: int, finding: Finding) -> None:
        """The run is taken back from this step.

        Raises:
            UserError: that happened too often lately.
        """
        self.rollbacks.append(step)
        lately = [s for s in self.rollbacks if s > step - self._config.limit_steps]
        if len(lately) > self._config.limit:
            within = f"within guard.limit_steps = {self._config.limit_steps}"
            self._give_up(f"step {step} would be rollback number {len(lately)} {within}", finding)

    def _give_up(self, what: str, finding: Finding) -> None:
        raise UserError(
            f"guard.limit: {what} ({finding}); {self._config.limit} are borne. Lower optimizer."
            "learning_rate, raise guard.threshold, or look at what the reports above name",
            reported=self._reported,
        )

    def state(self) -> dict[str, Any]:
        """All that a run must remember, as plain numbers and lists."""
        return {
            "windows": {quantity: list(window) for quantity, window in self._windows.items()},
            "in_a_row": self._in_a_row,
            "skipped": self.skipped,
            "rollbacks": list(self.rollbacks),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; a smaller `guard.window` keeps the latest."""
        for quantity, values in state["windows"].items():
            self._windows[quantity] = deque(values, maxlen=self._config.window)
        self._in_a_row = state["in_a_row"]
        self.skipped = state["skipped"]
        self.rollbacks = list(state["rollbacks"])


def robust_z(value: float, window: deque[float]) -> tuple[float, float]:
    """The window's median, and how many robust standard deviations a value lies above it."""
    middle = median(window)
    spread = _NORMAL * median(abs(entry - middle) for entry in window)
    spread = max(spread, _LEAST_SPREAD * abs(middle), 1e-12)
    return middle, (value - middle) / spread
