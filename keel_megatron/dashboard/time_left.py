"""Time left of a run, estimated from the records and settings in its folder, which may be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keel_megatron.config.batch_sizes import BatchSizes

_IMPLAUSIBLE = 10**15
_INCREMENTS = 100_000
"""More than any run has; each is a round of a loop."""


def seconds_left(
    recent: Sequence[Mapping[str, Any]], steps: int | None, settings: Mapping[str, Any]
) -> float | None:
    """Seconds to the last step; None if unknown.

    Args:
        recent: the last steps' records, whose values are numbers.
        steps: steps of the whole run.
        settings: the run's config.yaml by section, not validated.
    """
    seconds = [record["seconds"] for record in recent if "seconds" in record]
    if not steps or not seconds:
        return None
    last = recent[-1]
    whole = sum(seconds) / len(seconds) * (steps - last["step"])
    sizes, consumed = _batch_sizes(settings), last.get("consumed_samples")
    if sizes is None or type(consumed) is not int or len(recent) < 2:
        return float(whole)
    before = recent[0].get("consumed_samples")
    if type(before) is not int or not 0 <= before < consumed:
        return float(whole)
    # Steps of a batch size ramp-up take time in proportion to their sequences.
    per_sample = sum(seconds[1:]) / (consumed - before)
    return per_sample * sizes.samples_of(int(steps) - last["step"], consumed)


def _batch_sizes(settings: Mapping[str, Any]) -> BatchSizes | None:
    """The sequences of each step of a run with a batch size ramp-up; None without a sound one."""
    ramp = settings.get("schedule", {}).get("rampup_batch_size")
    full = settings.get("training", {}).get("global_batch_size")
    if not isinstance(ramp, dict):
        return None
    start, increment, samples = (ramp.get(name) for name in ("start", "increment", "samples"))
    if not all(_is_count(value) for value in (full, start, increment, samples)):
        return None
    assert isinstance(full, int)
    assert isinstance(start, int)
    assert isinstance(increment, int)
    assert isinstance(samples, int)
    increments, rest = divmod(full - start, increment)
    sound = 0 < increments <= _INCREMENTS and not rest
    return BatchSizes(full, start, increments, samples) if sound else None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < _IMPLAUSIBLE
