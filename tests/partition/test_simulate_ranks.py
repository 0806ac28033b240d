"""The simulator against Megatron-core's schedules on gloo ranks, with passes of known length.

A pass sleeps instead of computing, so what is held against the clock is the order of passes and
messages and who waits for whom, whatever else the machine does.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from keel_megatron.config.run import RunConfig
from keel_megatron.model.language_model import transformer_config
from keel_megatron.partition.simulate import PipelineTimes, simulate
from keel_megatron.partition.stages import own_partition
from keel_megatron.runtime.distributed import start
from tests.distributed import run_ranks
from tests.settings import settings

PIPELINE, MICRO_BATCHES, REPEATS = 3, 6, 2
UNIT = 0.02
# Forward units of every chunk, and how many backward units for each forward one.
CASES: dict[str, tuple[list[float], float]] = {
    "1F1B, slow head": ([1, 2, 5], 2),
    "1F1B, slow middle, fast backward": ([1, 6, 1], 0.5),
    "interleaved, slow head": ([1, 1, 1, 2, 1, 4], 2),
    "interleaved, slow first stage": ([3, 1, 1, 3, 1, 1], 1),
}


class Nap(torch.autograd.Function):
    """The identity, whose passes take so many seconds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ahead: float, back: float) -> Tensor:
        ctx.back = back
        time.sleep(ahead)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.back)
        return gradient, None, None


class Sleeper(nn.Module):
    """A chunk that sleeps."""

    def __init__(self, config: Any, number: int, ahead: float, back: float) -> None:
        super().__init__()
        self.config, self.vp_stage, self.model_type = config, number, None
        self.ahead, self.back = ahead, back
        self.input: Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        self.input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self) -> Tensor:
        x = self.input if self.input is not None else torch.zeros(32, 2, 64, requires_grad=True)
        return Nap.apply(x, self.ahead, self.back)


def sections(virtual: int) -> dict[str, dict[str, Any]]:
    return settings(parallel__pipeline=PIPELINE, parallel__virtual_pipeline=virtual)


def sleep_all() -> list[list[float]]:
    """Seconds of a step of every case on this rank, as often as they are repeated."""
    found = []
    for forward, ratio in CASES.values():
        virtual = len(forward) // PIPELINE
        config = RunConfig.model_validate(sections(virtual))
        with start(config.parallel, config.training) as runtime:
            layout = own_partition(config, runtime).layout
            megatron = transformer_config(config, layout, 0, torch.float32, runtime.device)
            chunks = [
                Sleeper(megatron, chunk, UNIT * units, UNIT * units * ratio)
                for chunk, units in enumerate(forward[runtime.pipeline_rank :: PIPELINE])
            ]
            found.append([_step(runtime, chunks, config) for _ in range(REPEATS)])
    return found


def _step(runtime: Any, chunks: list[Sleeper], config: RunConfig) -> float:
    runtime.barrier()
    started = time.perf_counter()
    get_forward_backward_func()(
        forward_step_func=lambda _data, model: (model(), lambda out: (out.sum(), out.sum())),
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=MICRO_BATCHES,
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
    )
    runtime.barrier()
    return time.perf_counter() - started


@pytest.fixture(scope="module")
def slept() -> dict[str, float]:
    """The fastest step of each case."""
    ranks = run_ranks(PIPELINE, sleep_all)
    return {
        name: min(max(step) for step in zip(*(rank[number] for rank in ranks), strict=True))
        for number, name in enumerate(CASES)
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_the_simulator_says(case: str, slept: dict[str, float]) -> None:
    forward, ratio = CASES[case]
    times = PipelineTimes(
        PIPELINE,
        tuple(UNIT * units for units in forward),
        tuple(UNIT * units * ratio for units in forward),
        (0.0,) * PIPELINE,
    )
    # A sleep is never shorter; a busy machine wakes its sleepers late.
    predicted = simulate(times, MICRO_BATCHES).seconds
    assert 0.995 * predicted < slept[case] < 1.25 * predicted
