"""What a CUDA graph of a decoding step needs: the host waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.inference.trace_steps import trace_steps

MODELS: dict[str, dict[str, Any]] = {
    "keel": {"model__residual": "keel", "training__precision": "bf16"},
    "hybrid_norm": {"model__residual": "hybrid_norm", "model__num_query_groups": 2},
    "pre_ln": {
        "model__residual": "pre_ln",
        "model__tie_embeddings": True,
        "model__qk_norm": True,
    },
}


@pytest.mark.parametrize("rule", MODELS)
def test_a_static_step_can_be_captured(rule: str) -> None:
    found = trace_steps(MODELS[rule])
    assert sum(found["kernels"].values()) > 10
    assert (found["waits"], found["mixed"]) == ({}, {})


def test_a_step_that_waits_is_found() -> None:
    assert trace_steps(MODELS["keel"], fault=True)["waits"] == {"int in read (trace_steps.py)": 1}
