"""Measure Muon's update of all matrices of a deep model on a CPU, beside torch.optim.Muon.

python tools/bench/muon.py                                  # a deep, narrow model
python tools/bench/muon.py --blocks 32 --widths 128 256     # wider ones

Prints rows of the table in docs/benchmarks/muon.md.

The same gradients in every way. CPU time of one thread in alternating rounds, of which the fastest
counts: other load only adds to it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from keel_megatron.architecture.block_weights import block_weights
from keel_megatron.config.model import ModelConfig
from keel_megatron.engines.megatron.muon.orthogonalize import split
from keel_megatron.engines.megatron.muon.update import Settings, Stack, update
from tools.bench.peers import cpu_name

SETTINGS = Settings(
    learning_rate=1e-3,
    weight_decay=0.1,
    momentum=0.95,
    nesterov=True,
    ns_steps=5,
    adjust_lr_fn="match_rms_adamw",
)
Way = Callable[[], None]


@dataclass(frozen=True)
class Figures:
    """Of one way."""

    seconds: float
    operators: int


class Operators(TorchDispatchMode):
    """Counts torch's operators, without views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def model_of(width: int, blocks: int) -> ModelConfig:
    return ModelConfig(
        blocks=blocks,
        hidden_size=width,
        ffn_hidden_size=3 * width,
        num_attention_heads=4,
        num_query_groups=2,
    )


def stacks_of(model: ModelConfig) -> list[Stack]:
    """Every weight of all blocks."""
    torch.manual_seed(0)
    found, ones = [], torch.ones(model.blocks)
    for weight in block_weights(model):
        values = torch.randn(3, model.blocks, *weight.shape)
        found.append(Stack(weight, *(0.02 * values).unbind(0), ones, ones))
    return found


def separate(stacks: list[Stack]) -> list[Stack]:
    """The same, a stack a weight."""
    return [
        Stack(
            one.weight,
            *(
                values[block : block + 1]
                for values in (one.masters, one.gradients, one.momenta, one.rates, one.decays)
            ),
        )
        for one in stacks
        for block in range(len(one.rates))
    ]


def with_torch(stacks: list[Stack], make: Callable[[list[torch.nn.Parameter]], Any]) -> Way:
    """A step of one of torch's optimizers over the separate matrices."""
    parameters = []
    for one in stacks:
        pairs = zip(split(one.weight, one.masters), split(one.weight, one.gradients), strict=True)
        for masters, gradients in pairs:
            for matrix, gradient in zip(
                masters.flatten(1, 2), gradients.flatten(1, 2), strict=True
            ):
                parameter = torch.nn.Parameter(matrix.clone())
                parameter.grad = gradient.clone()
                parameters.append(parameter)
    optimizer = make(parameters)
    return lambda: optimizer.step()


def ways_of(model: ModelConfig) -> dict[str, Way]:
    stacks = stacks_of(model)
    alone = separate(stacks_of(model))
    return {
        "batched (ours)": lambda: update(stacks, SETTINGS, torch.float32),
        "one matrix at a time (ours)": lambda: update(alone, SETTINGS, torch.float32),
        "torch.optim.Muon": with_torch(
            stacks, lambda given: torch.optim.Muon(given, adjust_lr_fn="match_rms_adamw")
        ),
        "torch.optim.AdamW, fused": with_torch(
            stacks, lambda given: torch.optim.AdamW(given, fused=True)
        ),
    }


def measured(ways: dict[str, Way], rounds: int) -> dict[str, Figures]:
    operators = {}
    for name, way in ways.items():  # the first step also allocates states
        way()
        with Operators() as counted:
            way()
        operators[name] = counted.count
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            seconds[name].append(time.process_time() - begin)
    return {name: Figures(min(seconds[name]), operators[name]) for name in ways}


def rows(width: int, blocks: int, found: dict[str, Figures]) -> list[str]:
    base = found["batched (ours)"].seconds
    return [
        f"| {blocks} | {width} | {name} | {one.operators:,} | {one.seconds * 1e3:,.0f} | "
        f"{one.seconds / base:.1f} x |"
        for name, one in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, torch {torch.__version__}, {datetime.now(UTC).date()}\n")
    print("| blocks | h | way | torch operators | ms | of batched |")
    print("|-:|-:|---|-:|-:|-:|")
    for width in settings.widths:
        found = measured(ways_of(model_of(width, settings.blocks)), settings.rounds)
        print("\n".join(rows(width, settings.blocks, found)), flush=True)


if __name__ == "__main__":
    main()
