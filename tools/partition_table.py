"""Compare the computed stage balance with an even split, on the paper's deep models.

python tools/partition_table.py [--device h200]

Analytic: times of embedding, block and head are predicted by a roofline of the device. A row's
"relative to ideal" is the slowest stage's forward and backward time over the mean of all stages:
1.000 is a pipeline in which no stage waits for another. "bound" is the lower bound of any balance:
a stage of whole blocks, or one with only the head. Memory is not limited here.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.config.run import RunConfig
from keel_megatron.layout.chunks import from_counts
from keel_megatron.layout.devices import DEVICES, Device, device_named
from keel_megatron.layout.stages import Partition, partition

MODELS = {512: 256, 1024: 512}
"""Sub-layers and blocks."""
VOCABULARIES = {"32k": 32768, "128k": 131072}
STAGES = (8, 16, 32, 64)


def config_of(blocks: int, vocab_size: int, stages: int) -> RunConfig:
    """The paper's width (arXiv 2601.19895), bf16, micro-batches of one sequence."""
    return RunConfig.model_validate(
        {
            "model": {
                "blocks": blocks,
                "hidden_size": 1024,
                "ffn_hidden_size": 3072,
                "num_attention_heads": 16,
                "num_query_groups": 8,
            },
            "parallel": {"pipeline": stages},
            "data": {"seq_length": 4096, "vocab_size": vocab_size},
            "optimizer": {"learning_rate": 4.5e-3},
            "training": {"name": "table", "steps": 1, "global_batch_size": 1024},
        }
    )


def bound(found: Partition) -> float:
    """Lower bound of the slowest stage's time, relative to the mean of the stages.

    The slowest is at least the mean; it holds the head alone, the head with blocks, or blocks
    alone, of which some stage has at least the others' share rounded up.
    """
    times, stages = found.times, len(found.stages)
    blocks = sum(stage.blocks for stage in found.stages)
    unit, head = times.block.total, times.head.total
    mean = sum(stage.seconds for stage in found.stages) / stages
    least = min(
        max(head + k * unit, math.ceil((blocks - k) / (stages - 1)) * unit)
        for k in range(blocks + 1)
    )
    return max(mean, least) / mean


def row(sub_layers: int, name: str, stages: int, device: Device) -> str:
    blocks = MODELS[sub_layers]
    config = config_of(blocks, VOCABULARIES[name], stages)
    ours = partition(config, 1, device)
    even = partition(config, 1, device, layout=from_counts([blocks // stages] * stages, stages))
    counts = [stage.blocks for stage in ours.stages]
    faster = even.slowest.seconds / ours.slowest.seconds - 1
    middle = sorted(set(counts[1:-1]))
    spread = f"{middle[0]}" if len(middle) == 1 else f"{middle[0]}-{middle[-1]}"
    return (
        f"| {sub_layers} | {name} | {stages} | {counts[0]}, {spread}, {counts[-1]} "
        f"| {even.balance:.3f} | {ours.balance:.3f} | {bound(ours):.3f} | {100 * faster:.0f} % |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="h200", choices=[n for n in DEVICES if n != "cpu"])
    device = device_named(parser.parse_args().device, memory_gb=None)
    head = "| sub-layers | vocabulary | stages | blocks: first, middle, last "
    print(head + "| even split | computed balance | bound | step faster by |")
    print("|" + "---|" * 8)
    for sub_layers in MODELS:
        for name in VOCABULARIES:
            for stages in STAGES:
                print(row(sub_layers, name, stages, device))
    for name, vocab_size in VOCABULARIES.items():
        times = partition(config_of(256, vocab_size, 8), 1, device).times
        print(
            f"\nVocabulary {name} on {device.name}: block {1e3 * times.block.total:.2f} ms, head "
            f"{1e3 * times.head.total:.2f} ms ({times.head.total / times.block.total:.1f} blocks), "
            f"embedding {1e3 * times.embedding.total:.2f} ms."
        )


if __name__ == "__main__":
    main()
