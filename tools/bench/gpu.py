"""Measure each option on one GPU, and compare it with its prediction.

python tools/bench/gpu.py --predict        # write the predictions, without a GPU
python tools/bench/gpu.py                  # run all parts, each below ten minutes on an H200
python tools/bench/gpu.py --part deep      # one part: options-64, options-32, deep, kernel

The checks come first (gpu_checks.py; --part checks runs them alone): what the device's kernels
refuse, which of them torch chooses, a short run with a save and a resume. A check that fails does
not end the measurement.

Needs a python3 with this project's dependencies and CUDA torch; nothing is installed. Every
variant runs in a separate process (gpu_worker.py) on the same idle GPU with random tokens, the base
first. A failed variant is reported with its reason, and the others continue. docs/benchmarks/gpu.md
and gpu.json are written after every variant; unmeasured variants keep their prediction.

Exit codes: 0 = measured, or predictions written; 2 = torch sees no CUDA device, or a package is
missing: one line says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

UNABLE = 2
for package in ("pydantic", "yaml", "torch", "megatron"):
    if importlib.util.find_spec(package) is None:
        print(f"{sys.executable} has no {package}: nothing is measured")
        sys.exit(UNABLE)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from gpu_predict import (
    MICRO,
    MICRO_BATCHES,
    OPTIONS,
    Option,
    assumptions,
    best_settings,
    plan_of,
    step_parts,
)
from gpu_table import page

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.layout.devices import Device, device_named
from keel_megatron.planner.plan import make_plan

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs" / "benchmarks"
PAPER = {128: ROOT / "yaml/paper/keel_128.yaml", 1024: ROOT / "yaml/paper/keel_1024.yaml"}
COMMON = ("tracking.mlflow=false", "parallel.pipeline=1", "parallel.virtual_pipeline=1")
OPTION_RUN = (
    *COMMON,
    "parallel.recompute=none",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
)
DEEP_RUN = (*COMMON, "parallel.recompute=auto", "training.global_batch_size=4")
OFFLOAD = (
    "training.engine=deepspeed",
    "deepspeed.zero_stage=2",
    "deepspeed.offload_optimizer=true",
)
DEEP: dict[str, tuple[str, ...]] = {
    "Megatron-core's engine": (),
    "the same, the loss in pieces": ("kernels.logits_mib=512",),
    "DeepSpeed, offloaded": OFFLOAD,
}
"""How 1024 sub-layers may fit."""
WARMUP, STEPS = 2, 5
PART_SECONDS = 580
SHALLOW = ("base: Keel", "Pre-LN", "micro-batch 1", "micro-batch 1, CUDA graphs", "compile")
"""Options that 32 blocks are measured with, too."""
BEST = "best safe combination"
PARTS = ("options-64", "options-32", "deep", "kernel")


def option_config(option: Option, blocks: int) -> RunConfig:
    """The run of an option at a depth."""
    return load_config(PAPER[128], (*OPTION_RUN, f"model.blocks={blocks}", *option.settings))


def options_of(part: str, device: Device) -> tuple[int, list[Option]]:
    """Blocks and options of a part."""
    blocks = 64 if part == "options-64" else 32
    options = [one for one in OPTIONS if blocks == 64 or one.name in SHALLOW]
    return blocks, [*options, best_option(blocks, device)]


def best_option(blocks: int, device: Device) -> Option:
    """The defaults with the micro-batch and logits in memory whose predicted step is the shortest.

    Recomputation is what memory requires.
    """
    choices: dict[str, tuple[str, ...]] = {}
    for size in MICRO_BATCHES:
        settings = (MICRO.format(size), "parallel.recompute=auto")
        choices[f"{size}"] = settings
        choices[f"{size}, whole logits"] = (*settings, f"kernels.logits_mib={2048 * size}")
    runs = {name: option_config(Option(BEST, own, ""), blocks) for name, own in choices.items()}
    why = (
        "micro-batch chosen by the plan, and the loss in one piece; all other settings are the "
        "defaults"
    )
    return Option(BEST, choices[best_settings(runs, device)], why)


def predicted_options(part: str, device: Device) -> dict[str, Any]:
    """Every option's expected step beside the base's."""
    blocks, options = options_of(part, device)
    plans = [plan_of(option_config(option, blocks), device) for option in options]
    rows = {}
    for option, plan in zip(options, plans, strict=True):
        times = plan.partition.slowest.times
        rows[option.name] = {
            "settings": list(option.settings),
            "why": option.why,
            "predicted": {
                "step_seconds": plan.step_seconds,
                "step_seconds_range": list(plan.step_range),
                "mfu": plan.mfu,
                "share_of_measured_products": plan.product_share,
                "device_seconds": plan.micro_batches * times.device.total,
                "host_seconds": plan.micro_batches * times.host.total,
                "bound_by": times.bound,
                "parts": step_parts(plan),
                "ratio": plan.step_seconds / plans[0].step_seconds,
            },
        }
    return {"blocks": blocks, "rows": rows}


def predicted_deep(device: Device) -> dict[str, Any]:
    """The model of 1024 sub-layers on one device, as `keel plan` has it."""
    rows = {}
    for name, settings in DEEP.items():
        plan = make_plan(load_config(PAPER[1024], (*DEEP_RUN, *settings)), 1, device)
        stage = plan.partition.worst_memory
        rows[name] = {
            "settings": [*DEEP_RUN[1:], *settings],
            "predicted": {
                "step_seconds": None if settings == OFFLOAD else plan.step_seconds,
                "memory_gb": stage.memory.total / 1e9,
                "recomputed": sum(stage.recomputed),
                "fits": plan.partition.fits,  # it saves nothing
            },
        }
    return {"rows": rows}


def predictions(device: Device) -> dict[str, Any]:
    """All that is expected, of every part."""
    found: dict[str, Any] = {part: predicted_options(part, device) for part in PARTS[:2]}
    return found | {"deep": predicted_deep(device), "kernel": {"aim": 0.85}}


_waiting: list[subprocess.Popen[str]] = []
"""The next variant's process: it imports while the one before it measures."""


def worker() -> subprocess.Popen[str]:
    """A process of gpu_worker.py that waits for its order; it ends if none comes."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_worker.py"))]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def work(config: Path, settings: list[str], seconds: float, **order: Any) -> dict[str, Any]:
    """What a worker found, or why it found nothing (the end of its output then goes to stderr)."""
    order |= {"config": str(config), "settings": settings}
    order = {"warmup": WARMUP, "steps": STEPS} | order
    process = _waiting.pop() if _waiting else worker()
    _waiting.append(worker())
    try:
        out, err = process.communicate(json.dumps(order) + "\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"failed": f"not done after {seconds:.0f} s"}
    lines, words = out.strip().splitlines(), err.strip().splitlines()
    answer: dict[str, Any] = {}
    if process.returncode == 0 and lines:
        answer = json.loads(lines[-1])
    else:
        answer["failed"] = (words or [f"ended with {process.returncode}"])[-1][:300]
    if "failed" in answer:
        print(*words[-30:], sep="\n", file=sys.stderr, flush=True)
    return answer


def available(name: str) -> bool:
    """Whether a module could be imported."""
    try:
        return not name or importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def run_options(part: str, result: dict[str, Any], ends: float) -> None:
    """Measure a part's options, the base first; the ratio of each."""
    blocks, options = options_of(part, device_named(result["gpu"]))
    rows, base = result["parts"][part]["rows"], None
    for option in options:
        left = ends - time.monotonic()
        if not available(option.needs):
            found: dict[str, Any] = {"failed": f"{option.needs.partition('.')[0]} is not installed"}
        elif left < 20:
            found = {"failed": "the part's time was up"}
        else:
            settings = [*OPTION_RUN, f"model.blocks={blocks}", "training.device=cuda"]
            found = work(
                PAPER[128],
                [*settings, *option.settings],
                min(left, option.seconds),
                count_kernels=True,
            )
        base = found.get("step_seconds") if base is None else base
        if base and "step_seconds" in found:
            found["ratio"] = found["step_seconds"] / base
        keep(result, rows[option.name], found, f"{part}, {option.name}")


def run_deep(result: dict[str, Any], ends: float) -> None:
    """A few steps of the 1024 sub-layers; offloaded where they do not fit."""
    rows = result["parts"]["deep"]["rows"]
    for name, settings in DEEP.items():
        if settings == OFFLOAD and not available("deepspeed"):
            found: dict[str, Any] = {"failed": "deepspeed is not installed"}
        else:
            left = ends - time.monotonic()
            wanted = [*DEEP_RUN, "training.device=cuda", *settings]
            found = work(PAPER[1024], wanted, left, warmup=1, steps=3)
        keep(result, rows[name], found, f"deep, {name}")


def run_checks(result: dict[str, Any], ends: float) -> None:
    """The checks, which print their own lines."""
    print("checks", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checks.json"
        command = [sys.executable, str(Path(__file__).with_name("gpu_checks.py"))]
        command += ["--out", str(out)]
        try:
            subprocess.run(command, check=False, timeout=ends - time.monotonic(), cwd=ROOT)
            found: dict[str, Any] = {"checks": json.loads(out.read_text())}
        except (subprocess.SubprocessError, OSError, ValueError) as error:
            found = {"failed": str(error).splitlines()[0][:300]}
    keep(result, result["checks"], found, "checks")


def run_kernel(result: dict[str, Any], ends: float) -> None:
    """The fused kernel beside the device's own copy."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.json"
        command = [sys.executable, str(Path(__file__).with_name("kernel.py")), "--out", str(out)]
        try:
            subprocess.run(
                command, check=True, capture_output=True, timeout=ends - time.monotonic()
            )
            found: dict[str, Any] = json.loads(out.read_text())
        except (subprocess.SubprocessError, OSError) as error:
            found = {"failed": str(error).splitlines()[0][:300]}
    keep(result, result["parts"]["kernel"], found, "kernel")


def keep(result: dict[str, Any], row: dict[str, Any], found: dict[str, Any], name: str) -> None:
    """Write what was found at once: a later variant may end badly."""
    row["measured"] = found
    row["measured_on"] = datetime.date.today().isoformat()
    keys = ("step_seconds", "host_seconds", "ratio", "peak_memory_gb", "reserved_memory_gb")
    shown = found.get("failed") or ", ".join(
        f"{key} {found[key]:.4g}" for key in keys if key in found
    )
    print(f"{name}: {shown}", flush=True)
    write(result)


def write(result: dict[str, Any]) -> None:
    """Both files."""
    (RESULTS / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "gpu.md").write_text(page(result))


def with_earlier(parts: dict[str, Any]) -> dict[str, Any]:
    """Predictions, with what an earlier run has measured."""
    path = RESULTS / "gpu.json"
    earlier = json.loads(path.read_text())["parts"] if path.exists() else {}

    def merge(new: dict[str, Any], old: dict[str, Any]) -> None:
        for key in ("measured", "measured_on"):
            if key in old:
                new[key] = old[key]
        for name, row in new.get("rows", {}).items():
            merge(row, old.get("rows", {}).get(name, {}))

    for part, found in parts.items():
        merge(found, earlier.get(part, {}))
    return parts


def with_earlier_checks() -> dict[str, Any]:
    """What an earlier run of the checks has found."""
    path = RESULTS / "gpu.json"
    found: dict[str, Any] = json.loads(path.read_text()).get("checks", {}) if path.exists() else {}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--predict", action="store_true", help="write the expectations alone")
    parser.add_argument(
        "--part", choices=("checks", *PARTS), action="append", help="measure these parts alone"
    )
    parser.add_argument("--gpu", default="h200", help="what is predicted for (default h200)")
    parser.add_argument(
        "--seconds", type=float, default=PART_SECONDS, help="after which a part begins no more"
    )
    chosen = parser.parse_args()
    device = device_named(chosen.gpu)
    result: dict[str, Any] = {"gpu": chosen.gpu, "assumptions": assumptions(device)}
    result["parts"] = with_earlier(predictions(device))
    result["checks"] = with_earlier_checks()
    if chosen.predict:
        write(result)
        print(f"wrote {RESULTS / 'gpu.md'} and gpu.json: expectations")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing is measured (--predict writes what is expected)")
        return UNABLE
    for part in chosen.part or ("checks", *PARTS):
        ends = time.monotonic() + chosen.seconds
        if part == "checks":
            run_checks(result, ends)
        elif part == "deep":
            run_deep(result, ends)
        elif part == "kernel":
            run_kernel(result, ends)
        else:
            run_options(part, result, ends)
    return 0


if __name__ == "__main__":
    sys.exit(main())
