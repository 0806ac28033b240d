"""The learning rate's path."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from keel_megatron.config.checks import problems
from keel_megatron.config.optimizer import OptimizerConfig, ScheduleConfig
from keel_megatron.training.learning_rate import learning_rate
from tests.settings import small_config

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


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 0.75, 0.5),
        ("cosine", (2 + math.sqrt(2)) / 4, 0.5),
        ("sqrt", 0.5, 1 - 1 / math.sqrt(2)),
    ],
)
def test_a_decay_has_its_shape(shape: str, quarter: float, half: float) -> None:
    low = 1e-3
    rates = path(120, decay="wsd", decay_fraction=1 / 3, decay_shape=shape, min_learning_rate=low)
    assert rates[:80] == [PEAK] * 80
    assert rates[89] == pytest.approx(low + (PEAK - low) * quarter)
    assert rates[99] == pytest.approx(low + (PEAK - low) * half)
    assert rates[-1] == pytest.approx(low)


def test_an_exponential_decay_has_one_factor() -> None:
    rates = path(100, decay="wsd", decay_shape="exponential", min_learning_rate=PEAK / 100)
    factors = [b / a for a, b in itertools.pairwise(rates[79:])]
    assert factors == pytest.approx([100 ** (-1 / 20)] * 20)


@pytest.mark.parametrize(
    ("schedule", "setting"),
    [
        ({"decay": "cosine", "decay_shape": "sqrt"}, "schedule.decay_shape"),
        (
            {"decay": "wsd", "decay_shape": "exponential", "min_learning_rate": 0.0},
            "schedule.min_learning_rate",
        ),
    ],
)
def test_a_shape_that_has_no_effect_or_no_end_is_refused(
    schedule: dict[str, Any], setting: str
) -> None:
    config = small_config(**{f"schedule__{key}": value for key, value in schedule.items()})
    assert [path for path, _why in problems(config)] == [setting]


@pytest.mark.parametrize("steps", [1, 3, 100, 10**6])
def test_a_decay_of_no_step_is_refused(steps: int) -> None:
    wsd = {"schedule__decay": "wsd", "training__steps": steps, "schedule__min_learning_rate": 0.0}
    config = small_config(**wsd, schedule__decay_fraction=0.4 / steps)
    ((setting, why),) = problems(config)
    assert setting == "schedule.decay_fraction"
    least = float(why.rpartition(" ")[2])
    assert not list(problems(small_config(**wsd, schedule__decay_fraction=least)))
    assert path(steps, decay="wsd", decay_fraction=least, min_learning_rate=0.0)[-1] == 0.0
