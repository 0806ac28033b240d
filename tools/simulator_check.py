"""Compare the simulated step with the real trainer's, on two processes of this machine's CPU.

python tools/simulator_check.py               # a table in Markdown
python tools/simulator_check.py --out FILE    # and the figures as JSON

Blocks, embedding and head are timed in two simultaneous processes, like the trainer's two stages.
Then `keel train` runs each layout, and its steps are compared with the prediction. Both use the
lower quartile, because other load on the machine only adds time. It needs two idle cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.config.load import parse_config
from keel_megatron.config.run import RunConfig
from keel_megatron.layout.devices import device_named
from keel_megatron.layout.times import Times, UnitTimes
from keel_megatron.planner.plan import Measured, make_plan

PROCESSES = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "1F1B": {"layout": [12, 12]},
    "1F1B, uneven": {"layout": [17, 7]},
    "interleaved, 2 chunks": {"layout": [6, 6, 6, 6], "virtual_pipeline": 2},
    "interleaved, 4 chunks": {"layout": [3] * 8, "virtual_pipeline": 4},
    "1F1B, full recompute": {"layout": [12, 12], "recompute": "full"},
}


@dataclass(frozen=True)
class Row:
    """One layout."""

    layout: str
    measured_seconds: float
    predicted_seconds: float
    predicted_bubble: float

    @property
    def deviation(self) -> float:
        return self.predicted_seconds / self.measured_seconds - 1.0


def sections(text: Path, folder: Path, steps: int, parallel: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {
            "blocks": 24,
            "hidden_size": 128,
            "ffn_hidden_size": 384,
            "num_attention_heads": 4,
            "num_query_groups": 2,
        },
        "parallel": {"pipeline": PROCESSES, **parallel},
        "data": {
            "text": str(text),
            "seq_length": 128,
            "vocab_size": 2048,
            "cache_dir": str(folder / "data"),
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": {
            "name": "run",
            "steps": steps,
            "global_batch_size": 16,
            "micro_batch_size": 2,
            "precision": "fp32",
            "device": "cpu",
            "threads": 1,
            "validation_sequences": 4,
            "runs_dir": str(folder / "runs"),
        },
        "tracking": {"mlflow": False},
    }


def config_of(text: Path, folder: Path, steps: int, parallel: dict[str, Any]) -> RunConfig:
    return parse_config(sections(text, folder, steps, parallel), "simulator_check", PROCESSES)


def measure_together(config: RunConfig, samples: int) -> Measured:
    """The mean of what the processes measure while each keeps the other's core company."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES) as pool:
        waiting = context.Manager().Barrier(PROCESSES)
        found = pool.starmap(_measure, [(config, samples, waiting)] * PROCESSES)

    def mean(*values: float) -> float:
        return statistics.mean(values)

    def times(name: str) -> Times:
        pairs = [getattr(one.times, name) for one in found]
        return Times(mean(*(t.forward for t in pairs)), mean(*(t.backward for t in pairs)))

    return Measured(
        UnitTimes(times("embedding"), times("block"), times("head")),
        mean(*(one.update_block for one in found)),
        mean(*(one.update_embedding for one in found)),
    )


def _measure(config: RunConfig, samples: int, waiting: Any) -> Measured:
    from keel_megatron.planner.measure import measure_pieces

    waiting.wait()
    return measure_pieces(config, samples)


def train(folder: Path, settings: dict[str, Any]) -> float:
    """Seconds of a step of `keel train`: the lower quartile, without the first ones."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "keel_megatron", "train", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--processes", str(PROCESSES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"keel train failed:\n{done.stderr}")
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record["seconds"] for record in map(json.loads, lines) if "loss" in record]
    return statistics.quantiles(steps[2:], n=4)[0]


def check(text: Path, layouts: list[str], steps: int, samples: int) -> list[Row]:
    """Measure, predict and train each layout."""
    rows = []
    for name in layouts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            settings = sections(text, folder, steps, LAYOUTS[name])
            config = config_of(text, folder, steps, LAYOUTS[name])
            # Before and after the run; the faster counts, as whatever else happens only adds.
            before = measure_together(config, samples)
            seconds = train(folder, settings)
            after = measure_together(config, samples)
            plans = [
                make_plan(config, PROCESSES, device_named("cpu"), measured)
                for measured in (before, after)
            ]
            plan = min(plans, key=lambda one: one.step_seconds)
            rows.append(Row(name, seconds, plan.step_seconds, plan.bubble))
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| layout | trainer, ms | simulator, ms | deviation | bubble |", "|-|-:|-:|-:|-:|"]
    for row in rows:
        lines.append(
            f"| {row.layout} | {row.measured_seconds * 1e3:.0f} | "
            f"{row.predicted_seconds * 1e3:.0f} | {row.deviation:+.1%} | "
            f"{row.predicted_bubble:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--steps", type=int, default=16, help="steps of each run (default 16)")
    parser.add_argument("--samples", type=int, default=15, help="timed passes (default 15)")
    settings = parser.parse_args()
    rows = check(Path(argparse.__file__), list(LAYOUTS), settings.steps, settings.samples)
    print(table(rows))
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        figures = [{**asdict(row), "deviation": row.deviation} for row in rows]
        settings.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
