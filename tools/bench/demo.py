"""Time the demo (`make train`) and the recipe that it had before, each as a whole.

python tools/bench/demo.py                        # writes docs/benchmarks/demo.md
python tools/bench/demo.py --seeds 1234 1235      # the demo with two seeds

A time is that of the whole command: start, training, validations, checkpoints and sample. The
dataset is built before, so both find it. CPU time is that of all processes of a command: unlike
wall time, it hardly depends on what else runs on the machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.data.dataset import read_manifest
from keel_megatron.tracking.metrics import read_metrics
from tools.bench.peers import cpu_name

DEMO = ROOT / "yaml" / "demo.yaml"
PAGE = ROOT / "docs" / "benchmarks" / "demo.md"
EARLIER = (
    "data.seq_length=128",
    "optimizer.name=adamw",
    "optimizer.learning_rate=5e-3",
    "schedule.warmup_steps=20",
    "training.steps=200",
    "training.global_batch_size=16",
    "training.micro_batch_size=2",
    "training.validate_every=50",
    "checkpoint.every=100",
)
"""The recipe before Muon: everything in which it differs from the demo."""


@dataclass(frozen=True)
class Figures:
    """Of one run; times in seconds, losses in nats per token."""

    name: str
    config: RunConfig
    wall: float
    training: float
    cpu: float
    tokens_per_second: float
    loss: float
    load: float


def run(name: str, home: Path, settings: list[str]) -> Figures:
    """Train, from the command's start to its end.

    Raises:
        subprocess.CalledProcessError: the run fails.
    """
    load, cpu, begin = os.getloadavg()[0], children_seconds(), time.perf_counter()
    own = [*settings, f"training.name={name}"]
    keel("train", home, "--processes", "2", *own)
    wall = time.perf_counter() - begin
    records = list(read_metrics(home / "runs" / name / "metrics.jsonl"))
    steps = [record for record in records if "tokens_per_second" in record]
    return Figures(
        name=name,
        config=load_config(DEMO, own),
        wall=wall,
        training=sum(record["seconds"] for record in steps),
        cpu=children_seconds() - cpu,
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in steps),
        loss=[r["validation_loss"] for r in records if "validation_loss" in r][-1],
        load=(load + os.getloadavg()[0]) / 2,
    )


def keel(command: str, home: Path, *more: str) -> None:
    """A keel command about the demo, with its files in `home`."""
    own = [f"training.runs_dir={home / 'runs'}", f"data.cache_dir={home / 'data'}"]
    program = [sys.executable, "-m", "keel_megatron", *command.split()]
    subprocess.run([*program, str(DEMO), *more, *own], check=True, cwd=ROOT)


def children_seconds() -> float:
    """CPU time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def unigram_entropy(home: Path) -> float:
    """Nats per token, of the dataset that was built."""
    (found,) = (home / "data").glob("*/data.json")
    manifest, _ = read_manifest(found.parent)
    return manifest.unigram_entropy


def recipe(config: RunConfig) -> str:
    """What a run is trained with."""
    training, optimizer = config.training, config.optimizer
    return (
        f"{optimizer.name} {optimizer.learning_rate:g}, {config.schedule.warmup_steps} steps of "
        f"warm-up, {training.steps} steps of {training.global_batch_size} sequences of "
        f"{config.data.seq_length} tokens, micro-batches of {training.micro_batch_size}"
    )


def page(found: list[Figures], entropy: float) -> str:
    """docs/benchmarks/demo.md; the first of `found` is the earlier recipe's."""
    seeds = " ".join(str(one.config.training.seed) for one in found[1:])
    lines = [
        "# The demo and its earlier recipe",
        "",
        "<!-- test: skip, takes minutes -->",
        "```",
        f"python tools/bench/demo.py --seeds {seeds}",
        "```",
        "",
        "`keel train demo` and its earlier recipe, one after the other: 128 Keel sub-layers on two",
        "pipeline stages, 2 processes. wall: time of the whole command; the dataset is built",
        "before. training: time of the steps. CPU: processor time of all processes, on which other",
        "programs have little influence. load: mean of the load average at start and end; 2 means",
        "that only the run was active.",
        "",
        *table(found, entropy),
        "",
        f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{datetime.now(UTC).date()}. Losses in",
        f"nats per token; the unigram entropy is {entropy:.3f}.",
        "",
        *[f"- {one.name}: {recipe(one.config)}" for one in found],
    ]
    return "\n".join(lines) + "\n"


def table(found: list[Figures], entropy: float) -> list[str]:
    base = found[0].wall
    lines = [
        "| recipe | seed | validation loss | below the unigram entropy | wall | ratio | training "
        "| CPU | tokens | tokens/s | load |",
        "|---|-:|-:|-:|-:|-:|-:|-:|-:|-:|-:|",
    ]
    for one in found:
        training = one.config.training
        tokens = training.steps * training.global_batch_size * one.config.data.seq_length
        lines.append(
            f"| {one.name} | {training.seed} | {one.loss:.3f} | {entropy - one.loss:.3f} "
            f"| {one.wall:.0f} s | {one.wall / base:.2f} | {one.training:.0f} s "
            f"| {one.cpu:.0f} s | {tokens:,} | {one.tokens_per_second:,.0f} | {one.load:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1235])
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of all runs")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        home = Path(folder)
        keel("data build", home, *settings.set)
        found = [run("earlier", home, [*EARLIER, *settings.set])]
        for seed in settings.seeds:
            found.append(run(f"demo-{seed}", home, [f"training.seed={seed}", *settings.set]))
        entropy = unigram_entropy(home)
    text = page(found, entropy)
    print(text)
    settings.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
