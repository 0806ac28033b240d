"""Measure the cost of running Megatron-core on a CPU (compat/cpu.py) in a training step.

python tools/bench/cpu_layer.py                  # 32 sub-layers, hidden 256
python tools/bench/cpu_layer.py --shape deep     # 1024, hidden 64

It sums the own time of these functions in a profiled step and divides it by an unprofiled step. The
profiler slows each call, so this is an upper bound of their share.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from keel_megatron.compat import cpu
from tools.bench.peer_worker import FOR_LIFE, Shape, ours
from tools.bench.peers import SHAPES


def measure(name: str, threads: int, rounds: int) -> str:
    """One shape's row."""
    shape = Shape(**SHAPES[name], threads=threads)
    torch.set_num_threads(threads)
    step = ours(shape, "keel")
    size = (shape.micro_batches, shape.micro_batch_size, shape.seq_length + 1)
    batches = list(torch.randint(0, shape.vocab_size, size).unbind(0))
    step(batches)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        step(batches)
        seconds.append(time.perf_counter() - begin)
    profiler = cProfile.Profile()
    profiler.runcall(step, batches)
    calls, own = 0, 0.0
    for (file, _line, _name), (count, _all, tottime, *_rest) in pstats.Stats(
        profiler
    ).stats.items():  # type: ignore[attr-defined]
        if file == cpu.__file__:
            calls, own = calls + count, own + tottime
    whole = statistics.median(seconds)
    return f"{name}: {calls} calls a step, at most {own / whole:.3%} of {whole * 1e3:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="wide")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--rounds", type=int, default=7, help="steps without a profiler (default 7)"
    )
    chosen = parser.parse_args()
    with FOR_LIFE:
        print(measure(chosen.shape, chosen.threads, chosen.rounds))


if __name__ == "__main__":
    main()
