"""The global batch size of every step, with and without a ramp-up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from keel_megatron.config.batch_sizes import BatchSizes, Phase
from keel_megatron.config.checks import fits, problems
from keel_megatron.config.load import parse_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import ConfigError
from tests.settings import settings, small_config

RAMP = {"start": 4, "increment": 4, "samples": 32}


def ramped(**overrides: Any) -> RunConfig:
    return small_config(schedule__rampup_batch_size=RAMP, **overrides)


def one_by_one(sizes: BatchSizes, steps: int, consumed: int) -> list[int]:
    found = []
    for _ in range(steps):
        found.append(sizes.at(consumed))
        consumed += found[-1]
    return found


def test_without_a_ramp_up_every_batch_is_full() -> None:
    sizes = small_config().batch_sizes
    assert one_by_one(sizes, 3, 0) == [16, 16, 16]
    assert list(sizes.phases(3)) == [Phase(3, 16)]
    assert (sizes.unit, sizes.samples_of(3, 5)) == (16, 48)


def test_a_ramp_up_by_hand() -> None:
    """Three increments, at 32 / 3, 64 / 3 and 32 samples."""
    sizes = ramped().batch_sizes
    assert one_by_one(sizes, 8, 0) == [4, 4, 4, 8, 8, 12, 16, 16]
    assert list(sizes.phases(8)) == [Phase(3, 4), Phase(2, 8), Phase(1, 12), Phase(2, 16)]
    assert sizes.samples_of(4) == 20
    assert sizes.unit == 4


RAMPS = st.builds(
    lambda start, increment, increments, samples: BatchSizes(
        start + increment * increments, start, increments, samples
    ),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(1, 3000),
)


@given(RAMPS, st.integers(0, 100), st.integers(0, 4000))
def test_phases_are_the_steps_one_by_one(sizes: BatchSizes, steps: int, consumed: int) -> None:
    expected = one_by_one(sizes, steps, consumed)
    phases = list(sizes.phases(steps, consumed))
    assert [phase.size for phase in phases for _ in range(phase.steps)] == expected
    assert all(phase.steps > 0 for phase in phases)
    assert sizes.samples_of(steps, consumed) == sum(expected)
    assert all(size % sizes.unit == 0 for size in expected)


@given(RAMPS, st.integers(0, 4000))
def test_the_sizes_are_megatrons(sizes: BatchSizes, consumed: int) -> None:
    """Of whole numbers of samples between increments: it counts those in floating point."""
    sizes = BatchSizes(sizes.full, sizes.start, sizes.increments, sizes.samples * sizes.increments)
    theirs = RampupBatchsizeNumMicroBatchesCalculator(
        sizes.full, 1, 1, False, 0, sizes.start, sizes.increment, sizes.samples
    )
    theirs.update(consumed, False)
    assert theirs.get_current_global_batch_size() == sizes.at(consumed)


@pytest.mark.parametrize(
    ("ramp", "overrides", "path", "why"),
    [
        ({"start": 16}, {}, "schedule.rampup_batch_size", "start 16 must be smaller than"),
        ({"increment": 5}, {}, "schedule.rampup_batch_size", "increment 5 must divide .* = 12"),
        (
            {"start": 13, "increment": 3},
            {},
            "schedule.rampup_batch_size",
            "start 13 and increment 3 must be multiples of training.micro_batch_size = 2",
        ),
        ({"start": 14}, {"training__micro_batch_size": 3}, "training.global_batch_size", "16 must"),
    ],
)
def test_what_does_not_divide_is_refused(
    ramp: dict[str, int], overrides: dict[str, Any], path: str, why: str
) -> None:
    wanted = {"schedule__rampup_batch_size": RAMP | ramp, **overrides}
    with pytest.raises(ConfigError, match=why) as caught:
        parse_config(settings(**wanted), "test")
    assert [problem.path for problem in caught.value.problems][:1] == [path]


def test_errors_name_the_ramp_ups_own_settings() -> None:
    wrong = {"start": 0, "increments": 4, "samples": 1.5}
    with pytest.raises(ConfigError) as caught:
        parse_config(settings(schedule__rampup_batch_size=wrong), "test")
    found = {problem.path: problem.message for problem in caught.value.problems}
    where = "schedule.rampup_batch_size"
    assert found.keys() == {f"{where}.{k}" for k in ("start", "increment", "increments", "samples")}
    assert found[f"{where}.increments"] == "is unknown; did you mean increment?"
    assert found[f"{where}.increment"] == "is missing: Sequences that each increment adds."


def test_every_steps_batch_divides_among_replicas_and_stages() -> None:
    """The full batch divides in all cases."""
    assert fits(ramped(), 2)
    ((path, why),) = problems(ramped(), 4)
    assert path == "schedule.rampup_batch_size"
    assert why.startswith("start 4 and increment 4 must be multiples of micro_batch_size x repl")
    interleaved = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
    assert fits(ramped(**interleaved), 2)
    assert not fits(ramped(**interleaved), 4)
    assert fits(ramped(parallel__pipeline=2), 4)
