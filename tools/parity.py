"""Compare every parallel layout with one process: losses and gradient norms of the same run.

python tools/parity.py             # 20 steps of all layouts, on gloo ranks of this machine
python tools/parity.py --steps 4 "PP 2" "TP 2"
python tools/parity.py --optimizer muon
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

from keel_megatron.layout.devices import DEVICES
from keel_megatron.layout.stages import partition
from tests.settings import small_config
from tests.training.matrix import MATRIX, deviation, spread, trained


def stages(overrides: dict[str, Any], processes: int) -> str:
    config = small_config(**overrides)
    data_parallel = config.data_parallel_size(processes)
    found = partition(config, data_parallel, DEVICES["cpu"])
    shares = []
    for stage in found.stages:
        blocks = "+".join(str(chunk.blocks) for chunk in stage.chunks)
        again = sum(stage.recomputed)
        shares.append(blocks + (f" ({again} recomputed)" if again else ""))
    return " / ".join(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layouts", nargs="*", help="names of layouts; all without any")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    arguments = parser.parse_args()
    unknown = set(arguments.layouts) - MATRIX.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(MATRIX)}")
    optimizer = {"optimizer__name": arguments.optimizer}
    chosen = {
        name: (MATRIX[name][0], {**MATRIX[name][1], **optimizer})
        for name in arguments.layouts or MATRIX
    }
    started = time.monotonic()
    alone = trained(1, {"": optimizer}, arguments.steps)[""]
    found = spread(chosen, arguments.steps, timeout_seconds=3600.0)
    print("| layout | processes | blocks by stage | largest deviation: loss | grad norm |")
    print("|---|---|---|---|---|")
    for name, (processes, overrides) in chosen.items():
        apart = deviation(found[name], alone)
        print(
            f"| {name} | {processes} | {stages(overrides, processes)} | {apart.loss:.1e} "
            f"| {apart.grad_norm:.1e} |"
        )
    seconds = time.monotonic() - started
    print(f"\n{arguments.steps} steps, {arguments.optimizer}, fp32; {seconds:.0f} s in all.")


if __name__ == "__main__":
    main()
