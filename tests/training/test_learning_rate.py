"""The learning rate's path."""

from __future__ import annotations

import itertools
import math

import pytest

from keel_megatron.config.optimizer import OptimizerConfig, ScheduleConfig
from keel_megatron.training.learning_rate import learning_rate

PEAK = 1e-2
OPTIMIZER = OptimizerConfig(learning_rate=PEAK)


def path(steps: int, **schedule: object) -> list[float]:
    settings = ScheduleConfig.model_validate(schedule)
    return [learning_rate(step, steps, OPTIMIZER, settings) for step in range(1, steps + 1)]


def test_warmup_rises_linearly_to_the_peak() -> None:
    rates = path(100, warmup_steps=10)
    assert rates[:10] == pytest.approx([PEAK * step / 10 for step in range(1, 11)])


def test_cosine_passes_the_middle_halfway_and_ends_at_the_minimum() -> None:
    rates = path(110, warmup_steps=10, decay="cosine", min_learning_rate=1e-4)
    assert rates[59] == pytest.approx((PEAK + 1e-4) / 2)
    assert rates[34] == pytest.approx(1e-4 + (PEAK - 1e-4) * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[-1] == pytest.approx(1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_wsd_is_stable_then_falls_linearly() -> None:
    rates = path(100, warmup_steps=10, decay="wsd", decay_fraction=0.2, min_learning_rate=0.0)
    assert rates[10:80] == [PEAK] * 70
    assert rates[89] == pytest.approx(PEAK / 2)
    assert rates[-1] == 0.0


def test_constant_stays_and_no_warmup_starts_at_the_peak() -> None:
    assert path(5, decay="constant") == [PEAK] * 5
    assert path(5, decay="cosine")[0] < PEAK
