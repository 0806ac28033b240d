"""The signs of divergence on made-up curves."""

from __future__ import annotations

import math
import random

import pytest

from keel_megatron.studies.divergence import Curve, divergence, reference, smooth

STEPS = 1000


def falling(
    low: float = 3.0, speed: float = 100.0, noise: float = 0.05, seed: int = 0
) -> list[float]:
    """A loss that falls from 7.6 to `low`, with noise."""
    draw = random.Random(seed)
    return [low + (7.6 - low) * math.exp(-n / speed) + draw.gauss(0.0, noise) for n in range(STEPS)]


def verdict(losses: list[float], *others: list[float]) -> tuple[int, str] | None:
    """The step and sign of a curve among others."""
    curves = [smooth(one, STEPS) for one in (losses, *others)]
    found = divergence(curves[0], reference(curves))
    return None if found is None else (found.step, found.sign)


def test_a_curve_that_falls_to_its_end_has_not_diverged() -> None:
    assert verdict(falling(), falling(seed=1)) is None
    # A little worse than the best, as rules are.
    assert verdict(falling(3.5, 150.0), falling(3.0)) is None


def test_a_spike_without_recovery_is_found_at_its_step() -> None:
    losses = falling()
    losses[600:] = [6.5] * 400
    step, sign = verdict(losses, falling(seed=1)) or (0, "")
    assert sign == "spike"
    assert step == pytest.approx(601, abs=0.02 * STEPS)


def test_a_spike_that_recovers_is_no_divergence() -> None:
    losses = falling()
    losses[600:650] = [6.5] * 50
    assert verdict(losses, falling(seed=1)) is None


def test_a_spike_at_the_very_end_may_still_have_recovered() -> None:
    losses = falling()
    losses[970:] = [6.5] * 30
    assert verdict(losses, falling(seed=1)) is None


def test_a_slow_rise_without_end_is_a_spike_without_recovery() -> None:
    """A ramp's usual end: the rate is too high, and the loss creeps up."""
    losses = [loss + max(0, n - 500) * 0.004 for n, loss in enumerate(falling())]
    step, sign = verdict(losses, falling(seed=1)) or (0, "")
    assert sign == "spike"
    # 10 % of the drop of 4.6 is reached 115 steps after the turn.
    assert step == pytest.approx(615, abs=0.03 * STEPS)


def test_an_early_plateau_is_found_where_it_begins() -> None:
    """It falls as the others do until step 100, and stays there."""
    losses = [max(loss, 5.0) for loss in falling(3.0, 150.0, 0.0)]
    begun = next(n for n, loss in enumerate(losses, 1) if loss == 5.0)
    step, sign = verdict(losses, falling(3.0, 150.0)) or (0, "")
    assert sign in ("plateau", "slow")
    assert step == pytest.approx(begun, abs=0.03 * STEPS)


def test_a_plateau_that_all_share_is_no_divergence() -> None:
    losses = [max(loss, 5.0) for loss in falling(3.0, 150.0, 0.0)]
    assert verdict(losses, losses) is None


def test_a_slow_loss_is_one_that_falls_less_than_half_as_far() -> None:
    slow = falling(6.0, 300.0, 0.0)
    step, sign = verdict(slow, falling(3.0, 100.0, 0.0)) or (0, "")
    assert sign == "slow"
    assert step < 0.1 * STEPS


def test_a_loss_that_is_not_finite_and_an_early_end_are_divergences() -> None:
    losses = falling()
    losses[700] = math.nan
    assert verdict(losses, falling(seed=1)) == (701, "not finite")
    assert verdict(falling()[:700], falling(seed=1)) == (701, "not finite")
    assert divergence(smooth([math.nan], STEPS), [4.0]) is not None


def test_smoothing_keeps_the_steps_and_drops_outliers() -> None:
    losses = falling(noise=0.0)
    losses[300] = 100.0
    curve = smooth(losses, STEPS)
    assert (curve.steps[0], curve.steps[-1], curve.lost) == (1, STEPS, None)
    assert max(curve.losses) < 7.6
    short = smooth([5.0, 4.0, 3.0], 3)
    assert short == Curve((1, 2, 3), (4.0, 4.0, 4.0), None)
