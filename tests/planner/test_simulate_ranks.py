"""The simulator against Megatron-core's schedules on gloo ranks, by clocks of their own.

A pass adds its length to its rank's clock instead of computing, and messages set the clocks
(tests/virtual_time.py). So what is compared is the order of passes and messages and who waits for
whom, and it is compared exactly, whatever else the machine does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from keel_megatron.config.run import RunConfig
from keel_megatron.layout.stages import own_partition
from keel_megatron.model.language_model import transformer_config
from keel_megatron.planner.simulate import PipelineTimes, simulate
from keel_megatron.runtime.distributed import start
from tests.distributed import run_ranks
from tests.settings import settings
from tests.virtual_time import VirtualClock

PIPELINE, MICRO_BATCHES = 3, 6
# Forward times of every chunk, how many backward times for each forward one, and the links'.
CASES: dict[str, tuple[list[float], float, list[float]]] = {
    "1F1B, slow head": ([1, 2, 5], 2, [0, 0, 0]),
    "1F1B, slow middle, fast backward": ([1, 6, 1], 0.5, [0, 0, 0]),
    "1F1B, slow first stage": ([5, 1, 1], 1, [0, 0, 0]),
    "1F1B, slow links": ([1, 1, 1], 3, [2, 2, 2]),
    "interleaved, slow head": ([1, 1, 1, 2, 1, 4], 2, [0, 0, 0]),
    "interleaved, slow first stage": ([3, 1, 1, 3, 1, 1], 1, [0, 0, 0]),
    "interleaved, slow links": ([2, 1, 1, 2, 1, 3], 2, [1, 0.5, 2]),
}


class Clock(VirtualClock):
    """A rank's clock, and when each of its passes ended."""

    def __init__(self, store: Any, link: list[float]) -> None:
        super().__init__(store, link)
        self.ends: list[float] = []


class Pass(torch.autograd.Function):
    """The identity, whose passes take so long by the clock."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, ahead: float, back: float) -> Tensor:
        ctx.clock, ctx.back = clock, back
        clock.add(ahead)
        clock.ends.append(clock.now)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.clock.add(ctx.back)
        ctx.clock.ends.append(ctx.clock.now)
        return gradient, None, None, None


class Chunk(nn.Module):
    """A chunk of a model that only takes time."""

    def __init__(self, config: Any, number: int, clock: Clock, ahead: float, back: float) -> None:
        super().__init__()
        self.config, self.vp_stage, self.model_type = config, number, None
        self.clock, self.ahead, self.back = clock, ahead, back
        self.input: Tensor | None = None

    def set_input_tensor(self, tensor: Any) -> None:
        self.input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self) -> Tensor:
        x = self.input if self.input is not None else torch.zeros(32, 2, 64, requires_grad=True)
        return Pass.apply(x, self.clock, self.ahead, self.back)


def sections(virtual: int) -> dict[str, dict[str, Any]]:
    return settings(parallel__pipeline=PIPELINE, parallel__virtual_pipeline=virtual)


def step_all() -> list[list[float]]:
    """When each pass of this rank ended, in a step of every case."""
    found = []
    for name, (forward, ratio, link) in CASES.items():
        virtual = len(forward) // PIPELINE
        config = RunConfig.model_validate(sections(virtual))
        with start(config.parallel, config.training) as runtime:
            layout = own_partition(config, runtime).layout
            megatron = transformer_config(config, layout, 0, torch.float32, runtime.device)
            store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
            clock = Clock(store, link)
            chunks = [
                Chunk(megatron, chunk, clock, time, time * ratio)
                for chunk, time in enumerate(forward[runtime.pipeline_rank :: PIPELINE])
            ]
            with clock.on_messages():
                found.append(_step(clock, chunks, config))
            runtime.barrier()
    return found


def _step(clock: Clock, chunks: list[Chunk], config: RunConfig) -> list[float]:
    get_forward_backward_func()(
        forward_step_func=lambda _data, model: (model(), lambda out: (out.sum(), out.sum())),
        data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=MICRO_BATCHES,
        seq_length=config.data.seq_length,
        micro_batch_size=config.training.micro_batch_size,
    )
    return clock.ends


@pytest.fixture(scope="module")
def stepped() -> dict[str, list[list[float]]]:
    """When each pass of every rank ended, in a step of each case."""
    ranks = run_ranks(PIPELINE, step_all)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_the_simulator_says(
    case: str, stepped: dict[str, list[list[float]]]
) -> None:
    forward, ratio, link = CASES[case]
    times = PipelineTimes(
        PIPELINE, tuple(forward), tuple(time * ratio for time in forward), tuple(link)
    )
    simulated = simulate(times, MICRO_BATCHES).stages
    assert stepped[case] == [[span.end for span in stage] for stage in simulated]
