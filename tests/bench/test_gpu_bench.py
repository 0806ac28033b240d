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
import gpu_predict  # type: ignore[import-not-found]  # noqa: E402
import gpu_table  # type: ignore[import-not-found]  # noqa: E402

from keel_megatron.config.load import load_config  # noqa: E402
from keel_megatron.layout.devices import DEVICES, SOURCES  # noqa: E402
from keel_megatron.planner.plan import make_plan  # noqa: E402

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
    "data.vocab_size=320",
)


def test_the_page_is_made_of_the_figures_and_every_option_has_an_expectation() -> None:
    kept = json.loads((ROOT / "docs/benchmarks/gpu.json").read_text())
    assert (ROOT / "docs/benchmarks/gpu.md").read_text() == gpu_table.page(kept)
    rows = kept["parts"]["options-64"]["rows"]
    assert rows.keys() == {option.name for option in gpu.OPTIONS} | {gpu.BEST}
    for row in rows.values():
        assert 0.5 < row["predicted"]["ratio"] < 2.0
        assert row["why"]
        assert set(row["predicted"]["parts"]) <= set(gpu_predict.REASONS)


def test_the_pages_figures_are_the_plans() -> None:
    """What `keel plan` prints for the command of a row is what the page expects of it."""
    kept = json.loads((ROOT / "docs/benchmarks/gpu.json").read_text())
    page = (ROOT / "docs/benchmarks/gpu.md").read_text()
    for part, blocks in (("options-64", 64), ("options-32", 32)):
        for name, row in kept["parts"][part]["rows"].items():
            settings = [*gpu.OPTION_RUN, f"model.blocks={blocks}", *row["settings"]]
            plan = make_plan(load_config(gpu.PAPER[128], settings), 1, DEVICES["h200"]).as_object()
            for key in ("step_seconds", "step_seconds_range", "mfu", "bound_by"):
                if key == "bound_by":
                    assert row["predicted"][key] == plan[key]
                    continue
                assert row["predicted"][key] == pytest.approx(plan[key], rel=1e-9), (name, key)
    plan = make_plan(load_config(gpu.PAPER[128], gpu.OPTION_RUN), 1, DEVICES["h200"])
    stated = f"{plan.step_seconds * 1e3:.1f}, MFU {plan.mfu:.1%}, {plan.product_share:.1%} of the"
    assert f"| step | {stated} measured product rate |" in page
    low, high = plan.step_range
    assert f"The base may be {low * 1e3:.0f} to {high * 1e3:.0f} ms" in page
    for source in SOURCES.values():
        assert source in page


def test_the_measured_steps_are_in_their_ranges() -> None:
    """What a GPU took is what the plan holds possible; the page names the only exception."""
    parts = json.loads((ROOT / "docs/benchmarks/gpu.json").read_text())["parts"]
    rows = parts["options-64"]["rows"]
    took = {name: row["measured"] for name, row in rows.items() if gpu_table._known(row)}
    assert len(took) == 17
    outside = {
        name: found["step_seconds"] / rows[name]["predicted"]["step_seconds_range"][1]
        for name, found in took.items()
        if gpu_table._excess(rows[name])
    }
    assert outside == {"SwiGLU in torch's operators": pytest.approx(1.014, abs=0.01)}
    for name in ("Megatron-core's engine", "the same, the loss in pieces"):
        found = parts["deep"]["rows"][name]["measured"]
        config = load_config(gpu.PAPER[1024], [*gpu.DEEP_RUN, *gpu.DEEP[name]])
        low, high = make_plan(config, 1, DEVICES["h200"]).step_range
        assert low < found["step_seconds"] < high
        assert found["planned_memory_gb"] == pytest.approx(found["peak_memory_gb"], rel=2e-3)
    for name, found in took.items():
        graphed = name in ("CUDA graphs", "micro-batch 1, CUDA graphs", "compile")
        wide = 0.03 if graphed else 3e-3
        assert found["planned_memory_gb"] == pytest.approx(found["peak_memory_gb"], rel=wide)


def test_the_page_says_which_aims_the_measurements_meet() -> None:
    page = (ROOT / "docs/benchmarks/gpu.md").read_text()
    assert "Not run yet: `--part options-32`, `--part kernel`.\n" in page
    lines = page.splitlines()
    (base,) = (line for line in lines if line.startswith("| 128 sub-layers, base"))
    assert base.endswith("| 41.8% | 52.1% | met |")
    (other,) = (line for line in lines if line.startswith("| 64 sub-layers, base"))
    assert other.endswith("| not run | not run |  |")
    assert "Keel / Pre-LN, 128 sub-layers: expected 1.001, measured 1.026: **not met**." in page
    assert "| not run: transformer_engine is not installed |" in page
    (unmeasured,) = (line for line in lines if line.startswith("| base") and "**275**" in line)
    assert unmeasured.endswith("| not run |  |  |  |  |")


def test_measurements_are_held_against_the_aims() -> None:
    parts = json.loads((ROOT / "docs/benchmarks/gpu.json").read_text())["parts"]
    for row in (one for part in parts.values() for one in part.get("rows", {}).values()):
        row.pop("measured", None)
    assert "Nothing here is measured on a GPU yet" in gpu_table._state(parts)
    rows = parts["options-64"]["rows"]
    for name, rate, peak in (("base: Keel", 397.0, 8.0), ("Pre-LN", 398.0, 10.0)):
        rows[name]["measured"] = {
            **{"step_seconds": 9.0, "tflops": rate},
            **{"planned_memory_gb": 10.0, "peak_memory_gb": peak},
        }
    goal = gpu_table._goal(parts, "h200")
    assert "| 40.1% | 50.0% | **not met** |" in goal  # 397 of 794.5
    assert "measured 1.000: met. Quartiles of the steps: 9000 to 9000 ms and" in goal
    assert "Range: 0 of 2 measured steps" in goal
    assert "1 of 2 rows; the others: 128 sub-layers, base: Keel +25.0%: **not met**" in goal
    rows["base: Keel"]["measured"] |= {"step_seconds": 9.2, "tflops": 398.0, "peak_memory_gb": 10.0}
    goal = gpu_table._goal(parts, "h200")
    assert "| 50.1% | met |" in goal
    assert "measured 1.022: **not met**" in goal
    assert "2 of 2 rows: met" in goal


def test_the_aims_are_expected_to_be_met() -> None:
    """Half of the measured product rate, and Keel at most 1.02 of Pre-LN, at both depths."""
    kept = json.loads((ROOT / "docs/benchmarks/gpu.json").read_text())["parts"]
    for part in ("options-64", "options-32"):
        rows = kept[part]["rows"]
        for name in ("base: Keel", gpu.BEST):
            assert rows[name]["predicted"]["share_of_measured_products"] >= 0.5
        assert 1.0 / rows["Pre-LN"]["predicted"]["ratio"] <= 1.02
        best = rows[gpu.BEST]["predicted"]["step_seconds"]
        assert best <= min(
            row["predicted"]["step_seconds"]
            for name, row in rows.items()
            if name.startswith(("base", "micro-batch", "loss"))
        )


def test_expectations_are_consistent() -> None:
    """Parts add up to the step, and an option that only adds work is slower."""
    found = gpu.predictions(DEVICES["h200"])
    rows = found["options-64"]["rows"]
    base = rows["base: Keel"]["predicted"]
    for row in rows.values():
        found_parts = row["predicted"]["parts"]
        assert sum(found_parts.values()) == pytest.approx(row["predicted"]["step_seconds"])
    assert rows["base: Keel"]["predicted"]["ratio"] == 1.0
    assert rows["recompute"]["predicted"]["ratio"] > 1.2
    for slower in ("joins", "rotary", "SwiGLU", "loss"):
        assert rows[f"{slower} in torch's operators"]["predicted"]["ratio"] > 1.04
    assert rows["CUDA graphs"]["predicted"]["ratio"] < 1.0
    assert 1.0 <= 1.0 / rows["Pre-LN"]["predicted"]["ratio"] < 1.02
    half = found["options-32"]["rows"]["base: Keel"]["predicted"]["step_seconds"]
    assert half < base["step_seconds"] < 2 * half


def test_what_fails_is_told_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []

    def work(_config: Path, settings: list[str], _seconds: float, **_order: Any) -> dict[str, Any]:
        asked.append(settings)
        if "kernels.cuda_graphs=true" in settings:
            return {"failed": "it | broke"}
        return {"step_seconds": 1.0 + len(asked), "tflops": 1.0, "device": "D", "torch": "T"}

    monkeypatch.setattr(gpu, "work", work)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    result = {"gpu": "h200", "assumptions": ["none"]}
    result["parts"] = gpu.with_earlier(gpu.predictions(DEVICES["h200"]))
    gpu.run_options("options-32", result, ends=float("inf"))
    page = (tmp_path / "gpu.md").read_text()
    assert len(asked) == len(gpu.SHALLOW) + 1
    assert "it / broke" in page
    assert "| 1.500 |" in page  # Pre-LN took 3 s, the base 2 s
    assert "D, torch T" in page
    # A later run of another part keeps it.
    again = gpu.with_earlier(gpu.predictions(DEVICES["h200"]))
    assert again["options-32"] == result["parts"]["options-32"]


def test_a_worker_measures_and_gives_its_reason() -> None:
    for settings, key in ((SMALL, "step_seconds"), ((*SMALL, "model.blocks=x"), "failed")):
        found = gpu.work(gpu.PAPER[128], list(settings), 900, warmup=1, steps=2)
        assert key in found, found
    assert "model.blocks" in found["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no CUDA device" in done.stdout
