"""The search: nothing better is overlooked, its winner is a valid run, and it is quick."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keel_megatron.config import load_config
from keel_megatron.config.checks import problems
from keel_megatron.errors import UserError
from keel_megatron.layout.devices import device_named
from keel_megatron.planner.plan import make_plan
from keel_megatron.planner.report import describe_search, seconds, si
from keel_megatron.planner.search import _layouts, _pipeline_seconds, _replicas, search
from keel_megatron.planner.simulate import PipelineTimes, simulate
from tests.calls import calls_of
from tests.settings import small_config

DEEP = Path(__file__).resolve().parents[2] / "yaml" / "paper" / "keel_1024.yaml"
H200 = device_named("h200")


def test_the_search_finds_what_trying_everything_finds() -> None:
    config = small_config(
        model__blocks=12, model__hidden_size=512, model__ffn_hidden_size=1536, parallel__pipeline=1
    )
    device = device_named("h200", memory_gb=4.16)  # 4 are reserved: most layouts do not fit
    plans = [
        make_plan(layout.config, layout.gpus, device) for layout in _layouts(config, 8, device)
    ]
    fitting = sorted(plan.step_seconds for plan in plans if plan.fits)
    found = search(config, 8, device)
    assert 0 < len(fitting) < len(plans)
    assert found.tried == len(plans)
    assert found.best[0].step_seconds == pytest.approx(fitting[0], rel=1e-9)
    assert [one.step_seconds for one in found.best] == sorted(
        one.step_seconds for one in found.best
    )


@pytest.mark.parametrize("gpus", [8, 96, 1024])
def test_the_winner_is_a_run(gpus: int) -> None:
    best = search(load_config(DEEP), gpus, H200).best[0]
    config = load_config(DEEP, best.overrides, world_size=best.plan.gpus)
    plan = make_plan(config, best.plan.gpus, H200)
    assert plan.fits
    assert plan.gpus <= gpus
    assert plan.step_seconds == pytest.approx(best.step_seconds, rel=0.02)
    recipe = make_plan(load_config(DEEP), 8, H200)
    if gpus == 8:
        assert plan.tokens_per_second >= recipe.tokens_per_second


def test_ten_thousand_devices_take_few_calls() -> None:
    config = load_config(DEEP)
    found, calls = calls_of(lambda: search(config, 10_000, H200))
    assert calls < 10_000_000  # seconds of Python
    assert found.tried > 1000
    assert all(0.0 <= one.message_seconds < one.pipeline_seconds for one in found.best)
    words = describe_search(found, 10_000)
    assert "faster than 2" in words
    assert re.search(r"Memory per device: [\d.]+ GB with 1, [\d.]+ GB with 2\.", words)
    assert f"leaves {10_000 - found.best[0].plan.gpus:,} devices idle" in words


def test_every_batch_of_a_ramp_up_divides_among_the_replicas() -> None:
    ramp = {"start": 4, "increment": 4, "samples": 100}
    config = small_config(schedule__rampup_batch_size=ramp)
    for layout in _layouts(config, 16, H200):
        assert not list(problems(layout.config, layout.gpus))
        assert layout.config.data_parallel_size(layout.gpus) <= 4


def test_nothing_that_fits_is_said() -> None:
    with pytest.raises(UserError, match=r"fits into 1 GB a device; raise --gpus"):
        search(load_config(DEEP), 8, device_named("h200", memory_gb=5.0))


def test_replicas_share_the_batch_evenly() -> None:
    assert _replicas(1024, 1, 100) == 64
    assert _replicas(1024, 8, 1000) == 128  # 128 groups of 8
    assert _replicas(1024, 5, 100) == 0
    assert _replicas(12, 1, 5) == 4


def test_a_long_steps_rate_goes_on() -> None:
    """Beyond what is followed a step goes on at its rate: within 0.5 % of following all of it."""
    forward = tuple(1.0 + 0.05 * (number % 3) for number in range(32))
    times = PipelineTimes(16, forward, tuple(2 * one for one in forward), (0.01,) * 16)
    assert _pipeline_seconds(times, 1600) == pytest.approx(simulate(times, 1600).seconds, rel=5e-3)


@pytest.mark.parametrize(
    ("number", "words"),
    [(1.86e15, "1,860 T"), (999.9e9, "1 T"), (12.3e9, "12.3 B"), (999.6, "1 k"), (7, "7")],
)
def test_numbers_are_never_in_powers_of_ten(number: float, words: str) -> None:
    assert si(number) == words


@pytest.mark.parametrize(("value", "words"), [(0.9999, "1 s"), (1234.5, "1,234 s"), (2e-3, "2 ms")])
def test_times_are_never_in_powers_of_ten(value: float, words: str) -> None:
    assert seconds(value) == words
