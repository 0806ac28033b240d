"""Measure what data.document_masks costs on a CPU: of attention, and of a whole step of the demo.

python tools/bench/documents.py                # the tables of docs/data.md
python tools/bench/documents.py --rounds 15

Attention, forward and backward: without masks; with the mask in memory that the program uses; with
a call of causal attention for every document, the alternative. CPU time of one thread in
alternating rounds, of which the fastest counts: other load on the machine only adds to it.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.config.load import load_config
from keel_megatron.data.batches import random_batch
from keel_megatron.engines.build import build_engine
from keel_megatron.model.attention import causal_attention
from keel_megatron.model.documents import Documents
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start

SHAPES = (
    # sequences, length, heads, groups, head size
    ("demo", 8, 64, 4, 2, 16),
    ("wide", 2, 512, 8, 4, 64),
    ("long", 1, 2048, 8, 2, 64),
)
PARTS = (1, 4, 16)
"""Documents in a sequence, of equal length."""
STEP = (
    "parallel.pipeline=1",
    "training.device=cpu",
    "training.threads=1",
)
"""How the demo is run here."""
DEMO = Path(__file__).resolve().parents[2] / "yaml" / "demo.yaml"


def fastest(ways: list[Callable[[], object]], rounds: int) -> list[float]:
    """Milliseconds of CPU time of each, in alternating rounds."""
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for number, way in enumerate(ways):
            begin = time.process_time()
            way()
            best[number] = min(best[number], time.process_time() - begin)
    return [1e3 * seconds for seconds in best]


def document_by_document(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """Attention of documents of one length, a call each."""
    parts = [
        causal_attention(*(x[begin : begin + length] for x in (query, key, value)))
        for begin in range(0, query.size(0), length)
    ]
    return torch.cat(parts)


def attention_ways(operands: list[Tensor], length: int) -> list[Callable[[], Tensor]]:
    """Attention without masks, with the mask, and with a call for every document."""
    s, b, _heads, d = operands[0].shape
    documents = Documents((torch.arange(s) // length).int().expand(b, s).contiguous())
    within = documents.within(operands[0], d)
    query, key, value = operands
    return [
        lambda: causal_attention(query, key, value),
        lambda: causal_attention(query, key, value, within=within),
        lambda: document_by_document(query, key, value, length),
    ]


def both_passes(way: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward."""
    return lambda: way().sum().backward()


def attention_rows(rounds: int) -> Iterator[str]:
    """The table of attention."""
    yield "| shape | documents a sequence | no masks, ms | mask, ms | a call a document, ms |"
    yield "|---|---|---|---|---|"
    for name, b, s, heads, groups, d in SHAPES:
        operands = [torch.randn(s, b, n, d, requires_grad=True) for n in (heads, groups, groups)]
        for parts in PARTS:
            ways = attention_ways(operands, s // parts)
            torch.testing.assert_close(ways[1](), ways[2](), rtol=1e-5, atol=1e-5)
            found = fastest([both_passes(way) for way in ways], rounds)
            size = f"{name}: {b} x {s}, {heads} heads, {groups} groups of {d}"
            yield f"| {size} | {parts} | " + " | ".join(f"{one:.2f}" for one in found) + " |"


def step_row(rounds: int) -> str:
    """A step of the demo on one process, without and with masks."""
    config = load_config(DEMO, STEP)
    training = config.training
    count = training.global_batch_size // training.micro_batch_size
    with start(config.parallel, training, Launch(0, 1, 0, 1)) as runtime:
        engine = build_engine(config, runtime, build_model(config, runtime))
        plain = [random_batch(config, number) for number in range(count)]
        starts = torch.rand(training.micro_batch_size, config.data.seq_length) < 1 / 64
        numbers = starts.cumsum(1).int()
        mask = (starts.roll(-1, 1) < 1).float()
        masked = [replace(batch, documents=numbers, loss_mask=mask) for batch in plain]
        found = fastest(
            [
                lambda batches=batches: engine.train_step(batches, count, 1e-4)
                for batches in (plain, masked)
            ],
            rounds,
        )
    return f"Step of the demo, one process: {found[0]:.0f} ms without, {found[1]:.0f} ms with masks"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    rounds: int = parser.parse_args().rounds
    torch.set_num_threads(1)
    today = datetime.now(UTC).date()
    print(f"{platform.machine()}, one thread, torch {torch.__version__}, {today}\n")
    for row in attention_rows(rounds):
        print(row)
    print("\n" + step_row(rounds))


if __name__ == "__main__":
    main()
