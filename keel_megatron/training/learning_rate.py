"""The learning rate as a function of the step, without state."""

from __future__ import annotations

import math

from keel_megatron.config.optimizer import OptimizerConfig, ScheduleConfig


def learning_rate(
    step: int, steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig
) -> float:
    """Learning rate of step `step` (1 .. steps).

    Rises linearly to the peak at `warmup_steps`, then decays to the minimum at `steps`: along a
    half cosine (`cosine`), in `decay_shape` over the last `decay_fraction` of the steps (`wsd`), or
    not at all (`constant`).
    """
    peak, low = optimizer.learning_rate, schedule.min_learning_rate
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    start, shape = schedule.warmup_steps, "cosine"
    if schedule.decay == "wsd":
        start = max(start, round(steps * (1.0 - schedule.decay_fraction)))
        shape = schedule.decay_shape
    if step <= start:
        return peak
    progress = min(1.0, (step - start) / max(1, steps - start))
    if shape == "exponential":
        return peak * (low / peak) ** progress
    return low + (peak - low) * _remaining(shape, progress)


def _remaining(shape: str, progress: float) -> float:
    """Share of the way from the minimum to the peak, from 1 to 0.

    `sqrt` is the 1 - sqrt of arXiv 2405.18392, where it is the best of such shapes.
    """
    if shape == "linear":
        return 1.0 - progress
    if shape == "sqrt":
        return 1.0 - math.sqrt(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
