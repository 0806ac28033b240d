"""What a strict trace must not show: the rules that hold the CUDA path without a GPU."""

from __future__ import annotations

from keel_megatron.config.run import RunConfig
from keel_megatron.planner.trace.result import RankTrace

WAITS = {
    "tolist in _result (engine.py)": "the step's loss, gradient norm and votes",
    "float in validate (engine.py)": "a validation's loss",
    "int in updates (optimizer_shards.py)": "a save's count of updates",
    "copy to the host in profile (collector.py)": "the depth profile's sums",
    "copy to the host in _host_copy (collector.py)": "the depth profile's copy of the weights",
}
"""The functions in which the host may wait for the device, and for what."""

_TIGHT, _LOOSE = 0.02, 0.05


def allowed_above(config: RunConfig) -> float:
    """How far a plan's memory may be above a trace's, relative to it.

    Small models have small activations, beside which what is counted once weighs more.
    """
    model = config.model
    return _TIGHT if model.hidden_size >= 1024 and model.blocks >= 32 else _LOOSE


def problems(config: RunConfig, trace: RankTrace) -> list[str]:
    """What is wrong with a rank, a sentence each."""
    found = [
        f"{name}: {operator} has operands on two devices ({count} x)"
        for name, part in trace.parts.items()
        for operator, count in part.mixed.items()
    ]
    found += [
        f"{name}: the host waits for the device: {wait} ({count} x)"
        for name, part in trace.parts.items()
        if name != "build"
        for wait, count in part.waits.items()
        if wait not in WAITS
    ]
    allowed = allowed_above(config)
    if not 0.0 <= trace.deviation <= allowed:
        part = next(part for part in trace.parts.values() if part.peak == trace.step_peak)
        found.append(
            f"the plan's step is {trace.deviation:+.2%} of the trace's {part.peak:,} bytes, and "
            f"may be from +0 % to +{allowed:.0%} "
            f"(at {part.peak_operator} called by {part.peak_where})"
        )
    return found + _save_problems(trace)


def _save_problems(trace: RankTrace) -> list[str]:
    """A save copies what a rank holds to the host: it neither gathers nor needs more memory."""
    if "save" not in trace.parts:
        return []
    save, step = trace.parts["save"], trace.parts["step"]
    found = [
        f"save: {number} x {what} in the group {group}, {size:,} bytes"
        for what, group, number, size in save.messages
    ]
    if save.peak > step.peak:
        found.append(
            f"save: {save.peak:,} bytes, the step {step.peak:,} (at {save.peak_operator} called by "
            f"{save.peak_where})"
        )
    return found
