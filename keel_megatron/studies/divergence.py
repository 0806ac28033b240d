"""When a run whose learning rate keeps rising has diverged.

The paper (arXiv 2601.19895, Table 1) names three signs and gives no numbers: an early plateau, a
spike without recovery, and an abnormally slow loss. The definitions below are this project's. They
look at the smoothed loss s(t), a centred median over `WINDOW` of the steps, at its running minimum
m(t), at the drop D(t) = s(1) - m(t), and at the reference R(t): the largest D(t) of any run that
saw the same batches at the same learning rates.

unrecovered spike
    From this step to the end, and for at least `WINDOW` of the steps, s(t) stays above m(t) by
    more than `SPIKE` x D(t). Behind a later one too little of the run is left to recover in.
early plateau
    From this step to the end, and for at least `EARLY` of the steps, m(t) falls by less than
    `FLAT` x R(end), although D(end) < `BEHIND` x R(end): other rules learned more.
slow loss
    From this step to the end, and for at least `LASTING` of the steps, D(t) < `SLOW` x R(t); only
    where R(t) is at least `STARTED` x R(end).

A loss that is not finite, or the end of the run before its last step, is a divergence at once. A
run has diverged at the earliest step of any sign. Imports no torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 0.05
SPIKE = 0.1
LASTING = 0.25
EARLY = 0.5
FLAT = 0.02
BEHIND = 0.8
SLOW = 0.5
STARTED = 0.1
POINTS = 500
"""Points that are kept of a curve."""


@dataclass(frozen=True)
class Curve:
    """A smoothed loss curve."""

    steps: tuple[int, ...]
    """Rising; at most `POINTS` of them."""
    losses: tuple[float, ...]
    """The smoothed loss at each, nats per token."""
    lost: int | None
    """The step at which the loss was not finite or the run ended early; None: never."""

    @property
    def minima(self) -> list[float]:
        """The running minimum m."""
        found: list[float] = []
        for loss in self.losses:
            found.append(min(loss, found[-1]) if found else loss)
        return found

    @property
    def drops(self) -> list[float]:
        """The drop D."""
        return [self.losses[0] - low for low in self.minima]


@dataclass(frozen=True)
class Divergence:
    """That a run has diverged."""

    step: int
    """The first step of the sign."""
    sign: str


def smooth(losses: Sequence[float], steps: int) -> Curve:
    """The smoothed curve of a run's losses.

    Args:
        losses: of steps 1, 2, ...; the run may have ended before its last step.
        steps: the run's steps.
    """
    finite = next((n for n, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    lost = finite + 1 if finite < steps else None
    half = max(2, round(WINDOW * steps / 2))
    kept = sorted({round(n * (steps - 1) / (min(POINTS, steps) - 1 or 1)) for n in range(POINTS)})
    shown = [n for n in kept if n < finite]
    smoothed = [
        statistics.median(losses[max(0, n - half) : min(finite, n + half + 1)]) for n in shown
    ]
    return Curve(tuple(n + 1 for n in shown), tuple(smoothed), lost)


def reference(curves: Sequence[Curve]) -> list[float]:
    """R: the largest drop at each point of curves that have the same steps, where they reach."""
    longest = max((curve.drops for curve in curves), key=len, default=[])
    others = [curve.drops for curve in curves]
    return [max(one[n] for one in others if n < len(one)) for n in range(len(longest))]


def divergence(curve: Curve, drops: Sequence[float]) -> Divergence | None:
    """The earliest sign of divergence.

    Args:
        curve: the run's.
        drops: R, from `reference`.
    """
    if not curve.steps:
        return Divergence(1, "not finite")
    found = [sign for sign in (_spike(curve), _plateau(curve, drops), _slow(curve, drops)) if sign]
    if curve.lost is not None:
        found.append(Divergence(curve.lost, "not finite"))
    return min(found, key=lambda one: one.step, default=None)


def _spike(curve: Curve) -> Divergence | None:
    rows = zip(curve.losses, curve.minima, curve.drops, strict=True)
    return _since(curve, [loss > low + SPIKE * drop for loss, low, drop in rows], "spike", WINDOW)


def _plateau(curve: Curve, drops: Sequence[float]) -> Divergence | None:
    low = curve.minima
    if curve.drops[-1] >= BEHIND * drops[-1]:
        return None
    return _since(curve, [one - low[-1] < FLAT * drops[-1] for one in low], "plateau", EARLY)


def _slow(curve: Curve, drops: Sequence[float]) -> Divergence | None:
    begun = STARTED * drops[-1]
    rows = zip(curve.drops, drops, strict=False)
    behind = [most >= begun and own < SLOW * most for own, most in rows]
    return _since(curve, behind, "slow", LASTING)


def _since(curve: Curve, holds: Sequence[bool], sign: str, lasting: float) -> Divergence | None:
    """From which step something holds to the end, if it lasts for a share of the steps."""
    first = len(holds)
    while first and holds[first - 1]:
        first -= 1
    if first == len(holds) or len(holds) - first < lasting * len(holds):
        return None
    return Divergence(curve.steps[first], sign)
