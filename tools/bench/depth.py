"""Measure the cost of depth profiles: alternating steps with and without one, on random tokens.

python tools/bench/depth.py [section.key=value ...] [--config YAML] [--pairs N]
torchrun --nproc-per-node 2 tools/bench/depth.py ...   # at a parallel layout

It prints, for the demo or another configuration, the ratio of the two kinds of step (median over
pairs), and the resulting share of training time at `tracking.depth_every`. Writing a profile is
included; its summary for MLflow and its pictures are not, because the MLflow worker, a separate
process, makes them. Processor time is printed too; other load on the machine affects it less than
wall-clock time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.config.load import load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch
from keel_megatron.depth.collector import DepthCollector
from keel_megatron.engines.megatron.engine import MegatronEngine
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.tracking.run_log import RunLog

DEMO = Path(__file__).resolve().parents[2] / "yaml" / "demo.yaml"


def made_up(config: RunConfig, runtime: Runtime) -> list[Batch]:
    training, s = config.training, config.data.seq_length
    size = training.micro_batch_size
    generator = torch.Generator().manual_seed(runtime.data_rank)
    batches = []
    for _ in range(training.global_batch_size // (size * runtime.data_size)):
        rows = torch.randint(0, config.data.vocab_size, (size, s + 1), generator=generator)
        batches.append(
            Batch(
                tokens=rows[:, :-1].contiguous(),
                labels=rows[:, 1:].contiguous(),
                loss_mask=torch.ones(size, s),
                position_ids=torch.arange(s).expand(size, s).contiguous(),
            )
        )
    return batches


def timed(engine: MegatronEngine, batches: list[Batch], log: RunLog | None) -> tuple[float, ...]:
    """Seconds on the wall and of the processor of one step, with a profile if there is a log."""
    runtime = engine.runtime
    runtime.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    depth = None
    if log is not None:
        depth = DepthCollector(engine)
    engine.train_step(batches, len(batches), 1e-4, depth=depth)
    if depth is not None and log is not None:
        profile = depth.profile(1)
        if runtime.is_main:
            log.write(profile)
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    runtime.barrier()
    return time.perf_counter() - wall, time.process_time() - cpu


def report(name: str, plain: list[float], profiled: list[float], every: int) -> None:
    step = statistics.median(plain)
    # Neighbours are compared, so that a machine that slows down slows both.
    ratio = statistics.median(b / a for a, b in zip(plain, profiled, strict=True))
    print(
        f"{name:15} {step:8.3f} s a step, {ratio:.2f} times that with a profile: "
        f"{100 * (ratio - 1) / every:.2f} % of training at depth_every = {every}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=DEMO)
    parser.add_argument("settings", nargs="*", help="section.key=value")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of steps that are timed")
    arguments = parser.parse_args()
    launch = Launch.from_environment()
    alone: Any = ["parallel.pipeline=1"] if launch.world_size == 1 else []
    config = load_config(arguments.config, [*alone, *arguments.settings], launch.world_size)
    with (
        tempfile.TemporaryDirectory() as folder,
        start(config.parallel, config.training) as runtime,
    ):
        engine = MegatronEngine(config, runtime, build_model(config, runtime))
        batches = made_up(config, runtime)
        log = RunLog(Path(folder), None)
        timed(engine, batches, None)
        timed(engine, batches, log)
        pairs = [
            (timed(engine, batches, None), timed(engine, batches, log))
            for _ in range(arguments.pairs)
        ]
        log.close()
        if runtime.is_main:
            model = config.model
            print(
                f"{model.sub_layers} sub-layers, hidden {model.hidden_size}, "
                f"{launch.world_size} process(es) on {runtime.device}"
            )
            for number, name in enumerate(("wall", "processor")):
                plain, profiled = ([pair[kind][number] for pair in pairs] for kind in (0, 1))
                report(name, plain, profiled, config.tracking.depth_every)


if __name__ == "__main__":
    main()
