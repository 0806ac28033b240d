"""Options of the kernels that do not go together."""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.config.checks import problems
from tests.settings import small_config


@pytest.mark.parametrize(
    ("switch", "overrides", "path"),
    [
        ("compile", {"parallel__tensor": 2}, "parallel.tensor"),
        ("compile", {"kernels__backend": "transformer_engine"}, "kernels.backend"),
        ("compile", {"model__dropout": 0.1}, "model.dropout"),
        (
            "compile",
            {"training__engine": "deepspeed", "deepspeed__zero_stage": 3},
            "deepspeed.zero_stage",
        ),
        ("compile", {"model__stream": "bf16"}, "model.stream"),
        ("cuda_graphs", {"model__stream": "bf16_stochastic"}, "model.stream"),
        ("cuda_graphs", {"training__device": "cpu"}, "training.device"),
        ("cuda_graphs", {"training__engine": "deepspeed"}, "training.engine"),
        ("cuda_graphs", {"training__precision": "fp32"}, "training.precision"),
        ("cuda_graphs", {"parallel__tensor": 2}, "parallel.tensor"),
        ("cuda_graphs", {"parallel__pipeline": 2}, "parallel.pipeline"),
        ("cuda_graphs", {"parallel__recompute": "full"}, "parallel.recompute"),
        ("cuda_graphs", {"kernels__backend": "apex"}, "kernels.backend"),
        ("cuda_graphs", {"model__dropout": 0.1}, "model.dropout"),
        ("cuda_graphs", {"data__document_masks": True}, "data.document_masks"),
    ],
)
def test_what_does_not_go_together_is_refused(
    switch: str, overrides: dict[str, Any], path: str
) -> None:
    fitting = {"training__device": "auto", "training__precision": "bf16"}
    config = small_config(**{f"kernels__{switch}": True, **fitting, **overrides})
    found = dict(problems(config))
    assert f"kernels.{switch}" in found[path]
    assert len(found) == 1
    assert not dict(problems(small_config(**{f"kernels__{switch}": True, **fitting})))
