"""The time that a run has left, from its last records and its settings."""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.dashboard.time_left import seconds_left

RECENT = [
    {"step": step, "seconds": 4.0, "consumed_samples": consumed}
    for step, consumed in ((1, 4), (2, 8), (3, 12))
]
RAMP = {"start": 4, "increment": 4, "samples": 32}


def saved(full: Any = 16, **ramp: Any) -> dict[str, dict[str, Any]]:
    return {
        "training": {"global_batch_size": full},
        "schedule": {"rampup_batch_size": {**RAMP, **ramp}},
    }


def test_the_steps_of_a_ramp_up_count_by_their_sequences() -> None:
    """A second for each sequence; 8, 8, 12 and twice 16 follow."""
    assert seconds_left(RECENT, 8, saved()) == pytest.approx(60.0)
    assert seconds_left(RECENT, 8, {}) == pytest.approx(5 * 4.0)
    assert seconds_left(RECENT, 3, saved()) == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": {"rampup_batch_size": 3}},
        {"schedule": {"rampup_batch_size": RAMP}},
        saved(full=[16]),
        saved(full=4),
        saved(start=True),
        saved(increment=0),
        saved(increment=5),
        saved(samples="many"),
        saved(full=10**14, increment=1),
    ],
)
def test_settings_that_are_no_runs_leave_the_steps(settings: dict[str, dict[str, Any]]) -> None:
    assert seconds_left(RECENT, 8, settings) == pytest.approx(5 * 4.0)


@pytest.mark.parametrize("consumed", [None, 12.5, -3, True])
def test_records_without_a_count_leave_the_steps(consumed: Any) -> None:
    records = [{**record, "consumed_samples": consumed} for record in RECENT]
    assert seconds_left(records, 8, saved()) == pytest.approx(5 * 4.0)


def test_nothing_is_known_without_steps_or_times() -> None:
    assert seconds_left([], 8, saved()) is None
    assert seconds_left(RECENT, None, saved()) is None
    assert seconds_left([{"step": 3}], 8, saved()) is None
