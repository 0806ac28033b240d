"""Strict traces in processes that are forked from one that has imported everything.

A process has traced once and is of no further use (keel_megatron/planner/trace/device.py).
"""

from __future__ import annotations

import os
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from keel_megatron.runtime.cores import available_cores
from tests.distributed import CONTEXT
from tests.settings import settings

SHAPE: dict[str, Any] = {
    "model__hidden_size": 1024,
    "model__ffn_hidden_size": 3072,
    "model__num_attention_heads": 16,
    "model__num_query_groups": 8,
    "model__blocks": 8,
    "data__seq_length": 1024,
    "data__vocab_size": 32768,
    "training__precision": "bf16",
    "training__device": "cuda",
    "training__micro_batch_size": 1,
    "training__global_batch_size": 32,
}
"""Shapes cost nothing: a trace takes as long as it has operators."""


@dataclass(frozen=True)
class Case:
    """A rank of a layout."""

    gpus: int
    stage: int
    overrides: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    """Name of a function of `tests.planner.trace.faults`, called before the trace."""


def trace_all(cases: dict[str, Case]) -> dict[str, tuple[list[str], Any]]:
    """For every case the problems (an exception is one) and the trace."""
    with ProcessPoolExecutor(available_cores(), CONTEXT, max_tasks_per_child=1) as pool:
        return dict(zip(cases, pool.map(_trace, cases.values()), strict=True))


def _trace(case: Case) -> tuple[list[str], Any]:
    os.environ["OMP_NUM_THREADS"] = "1"
    from keel_megatron.config.run import RunConfig
    from keel_megatron.layout.devices import device_named
    from keel_megatron.planner.trace.rank import Request, trace_rank
    from keel_megatron.planner.trace.strict import problems
    from tests.planner.trace import faults

    config = RunConfig.model_validate(settings(**{**SHAPE, **case.overrides}))
    if case.fault is not None:
        getattr(faults, case.fault)()
    request = Request(config, case.gpus, device_named("h200"), case.stage, strict=True)
    try:
        found = trace_rank(request)
    except Exception:
        return [traceback.format_exc()], None
    return problems(config, found), found
