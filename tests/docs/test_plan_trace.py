"""The plans of today against the traces of docs/benchmarks/plan_trace.md."""

from __future__ import annotations

import json

import pytest

from keel_megatron.layout.devices import device_named
from keel_megatron.planner.plan import make_plan
from tools.trace_table import GPUS, OUT, RECIPES, configured

TRACES = json.loads(OUT.with_suffix(".json").read_text())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("gpus", GPUS)
def test_a_recipes_plan_is_what_readme_says(recipe: str, gpus: int) -> None:
    """Never below the trace, and at most 0.3 % above it."""
    trace = TRACES[f"{recipe}/{gpus}"]
    plan = make_plan(configured(recipe, gpus), gpus, device_named("h200"))
    assert trace["stage"] == plan.partition.worst_memory.number
    step = max(part["peak_bytes"] for name, part in trace["parts"].items() if name != "save")
    planned = plan.partition.stages[trace["stage"]].memory.total
    assert 0.0 <= planned / step - 1.0 < 0.0035
