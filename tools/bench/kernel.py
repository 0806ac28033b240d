"""Measure the fused scaled add + RMSNorm against the device's own copy bandwidth.

python tools/bench/kernel.py --out FILE.json   # on CUDA: bandwidth, beside torch and torch.compile
python tools/bench/kernel.py --sweep           # on CUDA: which tile of the backward kernel is best
python tools/bench/kernel.py                   # on a CPU: a small run to see that it works

Bandwidth is the bytes that the operation has to move (kernels.bytes_per_token) over the time from
one CUDA event to the next, with a cold L2 cache, median of the samples. The copy counts its bytes
read and written. Needs torch (with Triton on CUDA) and this repository, nothing installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from keel_megatron.kernels import bytes_per_token, reference, scaled_add_norm

SHAPES = [(65536, 64), (65536, 256), (4096, 1024), (65536, 1024), (65536, 2048), (32768, 3072)]
SHAPES += [(32768, 4096), (16384, 8192), (8192, 16384)]
SMOKE_SHAPES = [(256, 64), (1024, 256)]
COPY_BYTES = 2**31
ALPHA, EPS = 128.0, 1e-5


def timer(device: str, samples: int) -> Callable[[Callable[[], Any]], float]:
    """A function that gives the median seconds of a call."""
    if device == "cpu":

        def on_cpu(call: Callable[[], Any]) -> float:
            times = []
            for _ in range(samples + 2):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
            return statistics.median(times[2:])

        return on_cpu
    cold = torch.empty(2**28, dtype=torch.int8, device=device)

    def on_cuda(call: Callable[[], Any]) -> float:
        for _ in range(3):
            call()
        pairs = []
        for _ in range(samples):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cold.zero_()  # the L2 cache then holds none of the operation's data
            # The device sleeps while the host queues the whole call, so that no launch is waited
            # for: about 1 ms.
            torch.cuda._sleep(2_000_000)
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) / 1e3 for begin, end in pairs)

    return on_cuda


def copy_bandwidth(device: str, time_of: Callable[[Callable[[], Any]], float]) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    size = COPY_BYTES if device == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_of(lambda: target.copy_(source))


class Problem:
    """One call's tensors: bf16 branch and z (fp32 on a CPU), fp32 stream, both norms."""

    def __init__(self, rows: int, h: int, device: str) -> None:
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.rows, self.h = rows, h
        x, f, dx_new, dz = torch.randn(4, rows, h, device=device).unbind(0)
        gains = 1 + 0.1 * torch.randn(2, h, device=device)
        self.leaves = [x, f.to(self.dtype), *gains.unbind(0)]
        self.leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        self.gradients = [dx_new, dz.to(self.dtype)]

    def forward(self, operation: Callable[..., Any]) -> Any:
        x, f, outer, inner = self.leaves
        return operation(x, f, ALPHA, outer, inner, EPS, self.dtype)

    def measure(
        self, time_of: Callable[[Callable[[], Any]], float], operation: Callable[..., Any]
    ) -> dict[str, float]:
        """Seconds and bytes a second, forward and backward."""
        # Gradients are wanted forward, too: what training saves is part of the time.
        seconds = [time_of(lambda: self.forward(operation))]
        out = self.forward(operation)
        seconds.append(
            time_of(
                lambda: torch.autograd.grad(out, self.leaves, self.gradients, retain_graph=True)
            )
        )
        moved = [self.rows * n for n in bytes_per_token(self.h, self.dtype, self.dtype)]
        return {
            "forward_seconds": seconds[0],
            "backward_seconds": seconds[1],
            "forward_bandwidth": moved[0] / seconds[0],
            "backward_bandwidth": moved[1] / seconds[1],
        }


def contenders(device: str) -> dict[str, Callable[..., Any]]:
    by_hand = partial(scaled_add_norm, backend="torch")
    if device == "cpu":
        return {"chosen (torch)": scaled_add_norm, "fused.py": by_hand}
    compiled = torch.compile(reference.scaled_add_norm, dynamic=False)
    return {
        "chosen (Triton)": scaled_add_norm,
        "fused.py": by_hand,
        "torch": reference.scaled_add_norm,
        "torch.compile": compiled,
    }


def compare(device: str, samples: int) -> dict[str, Any]:
    time_of = timer(device, samples)
    copy = copy_bandwidth(device, time_of)
    measured = []
    for rows, h in SHAPES if device == "cuda" else SMOKE_SHAPES:
        problem = Problem(rows, h, device)
        for name, operation in contenders(device).items():
            figures = problem.measure(time_of, operation)
            measured.append({"rows": rows, "hidden_size": h, "way": name, **figures})
        torch._dynamo.reset()
    return {"copy_bandwidth": copy, "measured": measured}


def sweep(samples: int) -> list[dict[str, Any]]:
    """Times of the backward kernel cut in other ways, best first for every hidden size."""
    from keel_megatron.kernels import triton_norm

    time_of, chosen, found = timer("cuda", samples), triton_norm.backward_tile, []
    for rows, h in [(65536, 64), (65536, 1024), (65536, 2048), (32768, 4096), (16384, 8192)]:
        problem = Problem(rows, h, "cuda")
        largest = max(1, 4096 // triton_norm.triton.next_power_of_2(h))
        tiles = {chosen(h)} | {
            triton_norm.Tile(r, warps, programs, stages)
            for r in {largest, max(1, largest // 2), max(1, largest // 4)}
            for warps in (4, 8, 16)
            for programs in (1, 2, 3, 4, 6)
            for stages in (1, 2)
        }
        for tile in sorted(tiles):
            triton_norm.backward_tile = lambda _h, tile=tile: tile
            try:
                figures = problem.measure(time_of, scaled_add_norm)
            except Exception as error:  # a tile may need more of the device than there is
                print(f"h = {h}, {tile}: {type(error).__name__}", file=sys.stderr)
                continue
            finally:
                triton_norm.backward_tile = chosen
            is_chosen = tile == chosen(h)
            found.append({"hidden_size": h, **tile._asdict(), "chosen": is_chosen, **figures})
    return sorted(found, key=lambda one: (one["hidden_size"], -one["backward_bandwidth"]))


def comparison_table(result: dict[str, Any]) -> str:
    copy = result["copy_bandwidth"]
    lines = [
        f"Copy: {copy / 1e9:.0f} GB/s.",
        "",
        "| rows | h | way | forward us | GB/s | of copy | backward us | GB/s | of copy |",
        "|-:|-:|-|-:|-:|-:|-:|-:|-:|",
    ]
    for one in result["measured"]:
        cells = [f"{one['rows']}", f"{one['hidden_size']}", one["way"]]
        for way in ("forward", "backward"):
            bandwidth = one[f"{way}_bandwidth"]
            cells += [f"{one[f'{way}_seconds'] * 1e6:.1f}", f"{bandwidth / 1e9:.0f}"]
            cells.append(f"{bandwidth / copy:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep_table(found: list[dict[str, Any]], best: int = 5) -> str:
    lines = ["| h | rows | warps | programs/SM | stages | chosen | GB/s |", "|-:" * 5 + "|-|-:|"]
    seen: dict[int, int] = {}
    for one in found:
        h = one["hidden_size"]
        seen[h] = seen.get(h, 0) + 1
        if seen[h] > best and not one["chosen"]:
            continue
        cells = [h, one["rows"], one["warps"], one["programs_per_sm"], one["stages"]]
        cells += ["yes" if one["chosen"] else "", f"{one['backward_bandwidth'] / 1e9:.0f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write every figure here, as JSON")
    parser.add_argument("--samples", type=int, default=30, help="timed calls of each (default 30)")
    parser.add_argument("--sweep", action="store_true", help="try other tiles of the backward pass")
    settings = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.sweep and device == "cpu":
        parser.error("--sweep needs a CUDA device")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    if device == "cpu":
        print("# A small run on a CPU: it shows that this works, and nothing about a GPU\n")
    else:
        print(f"# Fused scaled add + RMSNorm on {name}\n")
    result: dict[str, Any] = {"device": name, "torch": torch.__version__}
    if settings.sweep:
        result["sweep"] = sweep(settings.samples)
        print(sweep_table(result["sweep"]))
    else:
        result |= compare(device, settings.samples)
        print(comparison_table(result))
    if settings.out:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
