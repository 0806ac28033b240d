"""Compare the DeepSpeed engine with the Megatron engine: losses, and memory of real and large runs.

python tools/deepspeed_parity.py             # 20 steps, every stage and layout, on gloo ranks
python tools/deepspeed_parity.py --steps 4 "DP 2"
python tools/deepspeed_parity.py --plan      # the plan's memory of the large models alone
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.config import load_config
from keel_megatron.layout.devices import DEVICES
from keel_megatron.planner.plan import make_plan
from tests.distributed import run_ranks
from tests.engines.deepspeed.memory_ranks import held_bytes
from tests.engines.deepspeed.ranks import ENGINES, LAYOUTS, MEGATRON, watched_runs
from tests.settings import settings, small_config
from tests.training.matrix import deviation

LARGE = ("keel_512.yaml", "keel_1024.yaml")
RECIPES = Path(__file__).resolve().parent.parent / "yaml" / "paper"
SHAPE: dict[str, Any] = {
    "model__blocks": 3,
    "model__hidden_size": 128,
    "model__ffn_hidden_size": 256,
    "training__precision": "bf16",
}


def parity(names: list[str], steps: int) -> None:
    print("| layout | engine | largest deviation: loss | grad norm |")
    print("|---|---|---|---|")
    for name in names:
        size, layout = LAYOUTS[name]
        runs = [settings(**{**overrides, **layout}) for overrides in (MEGATRON, *ENGINES.values())]
        expected, *others = run_ranks(size, watched_runs, runs, steps, timeout_seconds=3600.0)[0]
        for engine, found in zip(ENGINES, others, strict=True):
            apart = deviation(found.steps, expected.steps)
            print(f"| {name} | {engine} | {apart.loss:.1e} | {apart.grad_norm:.1e} |", flush=True)


def small_memory() -> None:
    """Bytes a parameter of all tensors between the passes and the update, on one of two ranks."""
    config = small_config(**SHAPE)
    parameters = parameter_count(config.model, config.data.vocab_size)
    engines = {"Megatron, optimizer shared": MEGATRON, **ENGINES}
    runs = [
        settings(**{**SHAPE, **overrides, "deepspeed__bucket_size": 1000})
        for overrides in engines.values()
    ]
    ranks = run_ranks(2, held_bytes, runs)
    print("\n| engine, DP 2, bf16 | bytes a parameter, device and host |")
    print("|---|---|")
    for number, name in enumerate(engines):
        print(f"| {name} | {max(rank[number] for rank in ranks) / parameters:.2f} |")


def large_memory() -> None:
    """The plan's GB of a device, and of the host for it."""
    base = ("parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.layout=null")
    base += ("parallel.tensor=1", "parallel.sequence=false", "parallel.recompute=full")
    base += ("training.micro_batch_size=1",)
    print("| model | engine | 1 device | its host | 8 devices | their host |")
    print("|---|---|---|---|---|---|")
    for recipe in LARGE:
        for name, overrides in {"Megatron": {}, **ENGINES}.items():
            own = [
                f"{path.replace('__', '.')}={str(value).lower()}"
                for path, value in overrides.items()
                if path.startswith(("training__engine", "deepspeed__"))
                and not path.endswith("bucket_size")
            ]
            config = load_config(RECIPES / recipe, (*base, *own))
            cells = []
            for gpus in (1, 8):
                memory = make_plan(config, gpus, DEVICES["h200"]).partition.worst_memory.memory
                cells += [f"{memory.total / 1e9:.1f}", f"{gpus * memory.host / 1e9:.0f}"]
            print(f"| {config.training.name} | {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layouts", nargs="*", help="names of layouts; all without any")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plan", action="store_true", help="the plan's memory alone")
    arguments = parser.parse_args()
    unknown = set(arguments.layouts) - LAYOUTS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(LAYOUTS)}")
    if arguments.plan:
        large_memory()
        return
    started = time.monotonic()
    parity(arguments.layouts or list(LAYOUTS), arguments.steps)
    small_memory()
    print()
    large_memory()
    print(f"\n{arguments.steps} steps, fp32; {time.monotonic() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
