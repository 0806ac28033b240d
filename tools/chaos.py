"""Inject faults into a training run, and compare its result with an undisturbed run.

python tools/chaos.py --faults 100 --seed 1

A small Keel model with dropout is trained twice on several CPU ranks. The second time a seeded
sequence of faults is injected; the launcher, the watchdog, the guard and the checkpoints must
bring the run to its end. Loss curves and final checkpoints must be bit-identical, and every start
must resume from the newest valid checkpoint.

Both runs have the same poisoned batches, in which one rank's gradient is NaN: the guard must skip
the same updates in both. The seed determines the order of faults, their ranks and the steps between
them; the exact moment depends on the machine's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.checkpoint.state import Position
from keel_megatron.engines.megatron.engine import MegatronEngine
from keel_megatron.errors import UserError
from keel_megatron.mlflow_delivery.outbox_reader import OutboxReader
from keel_megatron.runtime import exit_codes
from keel_megatron.runtime.local_launch import launch
from keel_megatron.tracking.metrics import read_metrics
from tools.chaos_faults import SLOW_FILE, Disturbed, Injected

GRADIENT = "NaN in a gradient"
STEPS_PER_FAULT = 10
SLOW_SECONDS = 1.0
"""Of a step while another start is tried beside the run, which would else be over before it."""
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="ranks; an even number")
    parser.add_argument("--hang-timeout", type=float, default=20.0, help="seconds")
    parser.add_argument(
        "--folder", type=Path, help="where the runs go; a temporary one if left out"
    )
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    sys.exit(chaos(folder, arguments))


def chaos(folder: Path, arguments: argparse.Namespace) -> int:
    """Both runs and their comparison; 0 if nothing was lost."""
    chance = random.Random(arguments.seed)
    kinds = [GRADIENT, *Disturbed.KINDS]
    plan = [kinds[number % len(kinds)] for number in range(arguments.faults)]
    chance.shuffle(plan)
    steps = STEPS_PER_FAULT * (arguments.faults + 2)
    poisoned = sorted(chance.sample(range(2, steps - 2), plan.count(GRADIENT)))
    config = write_config(folder, steps, arguments)
    job = {"config": str(config), "poisoned": poisoned}
    (folder / "job.json").write_text(json.dumps(job))

    without_mlflow(folder)
    print(f"{steps} steps on {arguments.processes} ranks, in {folder}: undisturbed ...", flush=True)
    code = launch(arguments.processes, worker(folder, "calm"))
    if code != exit_codes.DONE:
        print(f"the undisturbed run ended with code {code}")
        return 1
    print("disturbed ...", flush=True)
    faults = [kind for kind in plan if kind != GRADIENT]
    disturbed = Disturbed(folder, partial(worker, folder), arguments.processes, chance)
    injected = disturbed.run(faults)
    calm, hurt = folder / "runs" / "calm", folder / "runs" / "hurt"
    skipped = report(injected, poisoned, hurt)
    return verdict(injected, skipped, differences(calm, hurt), arguments.faults)


def without_mlflow(folder: Path) -> None:
    """Let MLflow be absent: what is reported to it stays in the run's folder, to be counted."""
    stub = folder / "without_mlflow" / "mlflow"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "__init__.py").write_text('raise ImportError("left out by tools/chaos.py")\n')
    found = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(stub.parent), *([found] if found else [])])


def worker(folder: Path, name: str, *overrides: str) -> list[str]:
    """The command of one rank of a run."""
    return [str(Path(__file__).resolve()), "worker", str(folder / "job.json"), name, *overrides]


def write_config(folder: Path, steps: int, arguments: argparse.Namespace) -> Path:
    """A run that saves often, on real text."""
    folder.mkdir(parents=True, exist_ok=True)
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "blocks": 8,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "dropout": 0.1,
        },
        "parallel": {"pipeline": 2},
        "data": {
            "text": argparse.__file__,
            "seq_length": 32,
            "vocab_size": 512,
            "cache_dir": str(folder / "data"),
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": {
            "name": "calm",
            "runs_dir": str(folder / "runs"),
            "steps": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": 2,
            "precision": "fp32",
            "device": "cpu",
            "threads": 1,
            "hang_timeout": arguments.hang_timeout,
        },
        "checkpoint": {"every": 3, "keep": 4, "on_error": "continue"},
        "guard": {"action": "skip"},
        "tracking": {"mlflow": True, "depth_every": 4},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


class Poison:
    """Makes one parameter's gradient NaN on one rank, for chosen batches."""

    def __init__(self, batches: list[int]) -> None:
        self._batches = frozenset(batches)
        self._hook: Any = None

    def __call__(self, position: Position, engine: MegatronEngine) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        batch = position.consumed_samples // BATCH
        if (
            batch in self._batches
            and batch % engine.runtime.launch.world_size == engine.runtime.rank
        ):
            parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
            chosen = parameters[batch % len(parameters)]
            self._hook = chosen.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))


class SlowSteps:
    """Holds up every step of the disturbed run while a file is there."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self) -> None:
        until = time.monotonic() + SLOW_SECONDS
        while self._file.exists() and time.monotonic() < until:
            time.sleep(0.02)


def train(job_file: str, name: str, *overrides: str) -> None:
    """One rank of one of the runs."""
    from keel_megatron.training.run import run_training

    job = json.loads(Path(job_file).read_text())
    settings = (f"training.name={name}", *overrides)
    poison, slow = Poison(job["poisoned"]), SlowSteps(Path(job_file).with_name(SLOW_FILE))

    def before_step(position: Position, engine: MegatronEngine) -> None:
        if name == "hurt":
            slow()
        poison(position, engine)

    try:
        outcome = run_training(Path(job["config"]), settings, before_step=before_step)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_codes.USER_ERROR)
    sys.exit(outcome.exit_code)


def differences(calm: Path, hurt: Path) -> dict[str, int]:
    """How many steps and how many bits differ between two finished runs."""
    curves = [
        {
            line["step"]: (line["loss"], line["grad_norm"], line["consumed_samples"])
            for line in read_metrics(run / "metrics.jsonl")
            if "loss" in line
        }
        for run in (calm, hurt)
    ]
    # As text: NaN, which a poisoned step reports, is equal to nothing.
    steps = sum(
        repr(curves[0].get(step)) != repr(curves[1].get(step))
        for step in curves[0].keys() | curves[1].keys()
    )
    newest = [sorted((run / "checkpoints").glob("step_????????"))[-1] for run in (calm, hurt)]
    bits = 0
    names = {path.name for checkpoint in newest for path in checkpoint.glob("*.safetensors")}
    assert names, f"no tensors in {newest[0]}"
    for name in names | {"state.json"}:
        first, second = (content(checkpoint / name) for checkpoint in newest)
        bits += 8 * abs(len(first) - len(second))
        bits += sum((a ^ b).bit_count() for a, b in zip(first, second, strict=False) if a != b)
    return {"steps": steps, "bits": bits, "records": missing_records(calm, hurt)}


def content(path: Path) -> bytes:
    """A checkpoint's file, without the identity of its run: both runs have one of their own."""
    if path.name != "state.json":
        return path.read_bytes()
    state = json.loads(path.read_text())
    del state["extras"]["run"]
    return json.dumps(state).encode()


def missing_records(calm: Path, hurt: Path) -> int:
    """Steps whose depth profiles or reports to MLflow lack, and lines of log.txt not whole."""
    profiles, reports = [], []
    for run in (calm, hurt):
        records = read_metrics(run / "metrics.jsonl")
        profiles.append({line["step"] for line in records if "depth" in line})
        items = OutboxReader(run).waiting()
        reports.append(
            {item.values["step"] for item in items if "loss" in item.values.get("values", ())}
        )
    log = (hurt / "log.txt").read_text().splitlines()
    return (
        len(profiles[0] ^ profiles[1])
        + len(reports[0] ^ reports[1])
        + sum(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) is None for line in log)
    )


def report(injected: list[Injected], poisoned: list[int], run: Path) -> int:
    """A line a fault; how many poisoned batches the guard has found."""
    print("\n|  # | fault | rank | at step | resumed from | steps repeated | seconds |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for number, fault in enumerate(injected, start=1):
        print(
            f"| {number} | {fault.kind} | {fault.rank} | {fault.step} | {fault.resumed} "
            f"| {fault.repeated} | {fault.seconds:.1f} |"
        )
    log = (run / "log.txt").read_text().splitlines()
    found = 0
    for number, batch in enumerate(poisoned, start=len(injected) + 1):
        told = [line for line in log if f"guard, step {batch + 1} (skip)" in line]
        where = told[-1].rpartition("; ")[2] if told else "MISSED"
        print(f"| {number} | {GRADIENT}: {where} | - | {batch} | - | 0 | - |")
        found += bool(told)
    return found


def verdict(injected: list[Injected], skipped: int, found: dict[str, int], wanted: int) -> int:
    """The sums, and the exit code."""
    lost = sum(fault.lost for fault in injected)
    recovered = len(injected) + skipped
    print(
        f"\n{wanted} faults, {recovered} recovered from; "
        f"{sum(fault.repeated for fault in injected)} steps repeated; {lost} checkpoints lost; "
        f"{found['steps']} steps of the loss curve and {found['bits']} bits of the final "
        "checkpoint (weights, optimizer, generators, guard) different; "
        f"{found['records']} records missing (depth profiles, reports to MLflow, log)"
    )
    good = recovered == wanted and not lost and not any(found.values())
    print("nothing was lost" if good else "SOMETHING WAS LOST")
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        train(*sys.argv[2:])
    else:
        main()
