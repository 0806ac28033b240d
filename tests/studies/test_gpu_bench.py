"""`tools/bench/gpu.py`, as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
BENCH = ROOT / "tools" / "bench"
sys.path.insert(0, str(BENCH))
import gpu  # type: ignore[import-not-found]  # noqa: E402
import gpu_table  # type: ignore[import-not-found]  # noqa: E402

from keel_megatron.partition.devices import DEVICES  # noqa: E402

SMALL = (
    "parallel.pipeline=1",
    "training.global_batch_size=2",
    "training.device=cpu",
    "model.blocks=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "data.seq_length=16",
    "data.vocab_size=64",
)


def strip(parts: Any) -> Any:
    """Without what was measured, if anything was."""
    if not isinstance(parts, dict):
        return parts
    return {k: strip(v) for k, v in parts.items() if k not in ("measured", "measured_on")}


def test_the_expectations_in_the_documents_are_the_programs() -> None:
    """Written beforehand, and by the present model: `tools/bench/gpu.py --predict` again if not."""
    kept = json.loads((ROOT / "docs/benchmarks/gpu.json").read_text())
    computed = gpu.predictions(DEVICES[kept["gpu"]])
    expected = json.loads(json.dumps(computed))  # tuples are lists there
    assert strip(kept["parts"]) == pytest.approx_nested(expected) if False else True
    assert json.dumps(strip(kept["parts"])) == json.dumps(expected)
    assert (ROOT / "docs/benchmarks/gpu.md").read_text() == gpu_table.page(kept)
