"""Time the output layer and its loss in chunks, as a whole, and with torch's operators.

python tools/bench/cross_entropy.py            # shapes for a CPU; a vocabulary of 128k on CUDA

The variants are interleaved, forward and backward, with the weight's gradient added to an fp32 sum;
results are medians over the rounds. Peak is the memory that the operation allocates, without its
input, its weight and that sum: counted by torch's operators on a CPU, by the allocator on CUDA.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from keel_megatron.config.kernels import KernelsConfig
from keel_megatron.kernels.cross_entropy import linear_cross_entropy
from tests.memory import Watch

# Rows, hidden size, vocabulary, and rows of a piece: the demo's, a wider one, a large vocabulary.
CPU_SHAPES = [
    (512, 64, 2048, (256, 128, 64)),
    (1024, 256, 8192, (512, 256, 64)),
    (512, 128, 128000, (256, 128, 32)),
]
CUDA_SHAPES = [(4096, 1024, 128000, (2048, 1024, 512, 256, 128))]


class Head:
    """One shape's tensors, and the ways to go through them."""

    def __init__(self, rows: int, hidden_size: int, vocabulary: int, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.device, self.rows = device, rows
        self.x = torch.randn(rows, hidden_size, device=device, dtype=dtype, requires_grad=True)
        weight = 0.02 * torch.randn(vocabulary, hidden_size, device=device)
        self.weight = torch.nn.Parameter(weight.to(dtype))
        self.sums = torch.zeros_like(self.weight, dtype=torch.float32)
        self.weight.main_grad = self.sums  # type: ignore[attr-defined]
        self.labels = torch.randint(0, vocabulary, (rows,), device=device)
        self.gradients = torch.full((rows,), 1 / rows, device=device)

    def by_torch(self) -> None:
        """Its operators, as Megatron-core's layer and a cross entropy in fp32 use them."""
        logits = functional.linear(self.x, self.weight).float()
        losses = functional.cross_entropy(logits, self.labels, reduction="none")
        del logits
        self._back(losses)
        assert self.weight.grad is not None
        self.sums.add_(self.weight.grad)
        self.weight.grad = None

    def by_pieces(self, rows: int) -> None:
        self._back(
            linear_cross_entropy(self.x, self.weight, self.labels, rows=rows, accumulate=True)
        )

    def _back(self, losses: Tensor) -> None:
        losses.backward(self.gradients)  # type: ignore[no-untyped-call]
        self.x.grad = None

    def seconds(self, way: Callable[[], None]) -> float:
        self._wait()
        begin = time.perf_counter()
        way()
        self._wait()
        return time.perf_counter() - begin

    def peak(self, way: Callable[[], None]) -> int:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way()
            return torch.cuda.max_memory_allocated() - before
        with Watch() as watch:
            way()
        return watch.peak

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def table(head: Head, pieces: tuple[int, ...], rounds: int) -> list[str]:
    ways: dict[str, Callable[[], None]] = {
        "torch": head.by_torch,
        "whole": partial(head.by_pieces, head.rows),
        **{f"{rows} rows": partial(head.by_pieces, rows) for rows in pieces},
    }
    peaks = {name: head.peak(way) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(head.seconds(way))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    lines = ["| way | ms | of whole | peak MB |", "|-|-:|-:|-:|"]
    for name, seconds in medians.items():
        ratio = seconds / medians["whole"]
        lines.append(f"| {name} | {seconds * 1e3:.2f} | {ratio:.2f} | {peaks[name] / 1e6:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="a shape's time (default 20)")
    parser.add_argument("--threads", type=int, help="of a CPU (default: torch's)")
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} cores"
    print(f"# Output layer and loss on {where}")
    for rows, hidden_size, vocabulary, pieces in CUDA_SHAPES if device == "cuda" else CPU_SHAPES:
        head = Head(rows, hidden_size, vocabulary, device)
        once = min(head.seconds(head.by_torch) for _ in range(2))
        rounds = min(200, max(5, int(settings.seconds / once / (2 + len(pieces)))))
        default = KernelsConfig().rows_at_once(vocabulary)
        print(f"\n{rows} rows, hidden {hidden_size}, vocabulary {vocabulary}; ", end="")
        print(f"kernels.logits_mib does {min(rows, default)} at once\n")
        print("\n".join(table(head, pieces, rounds)))


if __name__ == "__main__":
    main()
