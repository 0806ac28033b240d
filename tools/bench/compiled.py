"""Time a block, forward and backward, compiled by torch.compile in parts or as a whole.

python tools/bench/compiled.py               # the shapes of tools/bench/peers.py
python tools/bench/compiled.py --shape deep --blocks 16 --rounds 15

Variants: `plain` = the hand-written operators; `parts` = the operators between the matrix products
compiled (scaled add + norms, split + rotation, SwiGLU), together and separately; `whole` =
`kernels.compile` (model/compiled.py). All use the same weights, with interleaved passes; gradients
are added to fp32 sums as in DDP.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from keel_megatron import compat

compat.install()  # before Megatron-core is imported

from keel_megatron.kernels import reference, scaled_add_norm
from keel_megatron.kernels.swiglu import swiglu
from keel_megatron.model import compiled, rotary
from keel_megatron.model.attention import causal_attention
from keel_megatron.model.linear import linear
from tools.bench.peers import SHAPES

ALPHA, EPS = 128.0, 1e-5
Ways = dict[str, Callable[..., tuple[Tensor, Tensor]]]


class Block:
    """One block's weights, with the sums that their gradients are added to."""

    def __init__(self, shape: dict[str, int], device: str, dtype: torch.dtype) -> None:
        h, f = shape["hidden_size"], shape["ffn_hidden_size"]
        d = h // shape["num_attention_heads"]
        rows = (shape["num_attention_heads"] + 2 * shape["num_query_groups"]) * d
        sizes = [(rows, h), (h, h), (2 * f, h), (h, f)]
        self.products = [
            nn.Parameter(torch.randn(*size, device=device, dtype=dtype) * 0.02) for size in sizes
        ]
        self.gains = [nn.Parameter(torch.ones(h, device=device)) for _ in range(4)]
        for weight in (*self.products, *self.gains):
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]

    def add_gradients(self) -> None:
        """As Megatron-core's DDP does."""
        for weight in (*self.products, *self.gains):
            if weight.grad is not None:
                weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
                weight.grad = None


def by_operators(split: Any, gate: Any, join: Any, groups: int) -> Callable[..., Any]:
    """The block of these operators between its products."""

    def block(x: Tensor, z: Tensor, table: Tensor, own: Block, following: Tensor) -> Any:
        qkv, proj, fc1, fc2 = own.products
        outer_a, inner, outer_f, _ = own.gains
        branch = linear(causal_attention(*split(linear(z, qkv), table, groups)), proj)
        x, z = join(x, branch, ALPHA, outer_a, inner, EPS, z.dtype)
        branch = linear(gate(linear(z, fc1)), fc2)
        return join(x, branch, ALPHA, outer_f, following, EPS, z.dtype)

    return block


def ways_of(groups: int) -> Ways:
    """The block in every way."""
    structure = compiled.Structure(groups, EPS, ALPHA, ALPHA, "norm", "norm")

    def split(mixed: Tensor, table: Tensor, _groups: int) -> Any:
        return compiled._query_key_value(mixed, table, structure, None)

    def gate(gate_up: Tensor) -> Tensor:
        first, second = gate_up.chunk(2, dim=-1)
        return functional.silu(first) * second

    def compile_(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False)

    hand = (rotary.split_rotary, swiglu, scaled_add_norm)
    made = (compile_(split), compile_(gate), compile_(reference.scaled_add_norm))
    compiler = compiled.Compiler()

    def whole(x: Tensor, z: Tensor, table: Tensor, own: Block, following: Tensor) -> Any:
        outer_a, inner, outer_f, _ = own.gains
        products = tuple(own.products)
        return compiler.run(
            structure, x, z, table, products, (outer_a, outer_f), (inner, following), None
        )

    return {
        "plain": by_operators(*hand, groups),
        "rotary alone": by_operators(made[0], hand[1], hand[2], groups),
        "SwiGLU alone": by_operators(hand[0], made[1], hand[2], groups),
        "joins alone": by_operators(hand[0], hand[1], made[2], groups),
        "parts": by_operators(*made, groups),
        "whole": whole,
    }


def measure(shape: dict[str, int], count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a block and micro-batch of every way, and seconds of its first passes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    s, b, h = shape["seq_length"], shape["micro_batch_size"], shape["hidden_size"]
    blocks = [Block(shape, device, dtype) for _ in range(count)]
    table = rotary.RotaryTable(h // shape["num_attention_heads"], 1e4, s, dtype)(s).to(device)
    start = torch.randn(s, b, h, device=device, requires_grad=True)

    def passes(way: Callable[..., Any]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        x, z = start * 1.0, start.to(dtype)
        for number, own in enumerate(blocks):
            x, z = way(x, z, table, own, blocks[(number + 1) % count].gains[3])
        (x.sum() + z.sum()).backward()
        for own in blocks:
            own.add_gradients()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    ways = ways_of(shape["num_query_groups"])
    first = {name: passes(way) + passes(way) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(passes(way))
    return {
        name: {"ms": statistics.median(found) / count * 1e3, "first": first[name]}
        for name, found in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="one shape (default: all)")
    parser.add_argument("--blocks", type=int, default=16, help="blocks in a row (default 16)")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each (default 15)")
    chosen = parser.parse_args()
    for name in [chosen.shape] if chosen.shape else sorted(SHAPES):
        found = measure(SHAPES[name], chosen.blocks, chosen.rounds)
        base = found["plain"]["ms"]
        print(f"\n{name}: {torch.get_num_threads()} thread(s), torch {torch.__version__}")
        print("| way | ms a block and micro-batch | ratio | first passes, s |\n|---|-:|-:|-:|")
        for way, one in found.items():
            print(f"| {way} | {one['ms']:.3f} | {one['ms'] / base:.2f} | {one['first']:.1f} |")


if __name__ == "__main__":
    main()
