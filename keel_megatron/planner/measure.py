"""Measure times on this device: one block, the embedding, the head, the update."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch, random_batch
from keel_megatron.engines.base import forward, mean_loss
from keel_megatron.engines.build import build_engine
from keel_megatron.engines.megatron.engine import MegatronEngine
from keel_megatron.errors import UserError
from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.devices import this_device
from keel_megatron.layout.times import Times, UnitTimes, predicted_times
from keel_megatron.layout.work import Kernel
from keel_megatron.model.language_model import build_model
from keel_megatron.planner.plan import Measured
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start

_FEW, _MANY = 2, 8
"""Block counts of the two models whose difference gives a block's time."""


def measure_pieces(config: RunConfig, samples: int = 12) -> Measured:
    """Measure one micro-batch through a block, the embedding and the head, and the update.

    Two shallow models with the run's shapes are trained in this process, in alternating samples, so
    that other load on the machine affects both. A block's time is their difference. The head's time
    is that of the smaller model minus its blocks and its embedding, which is timed separately.

    Args:
        config: the run; its depth and layout do not matter.
        samples: timed passes of each; the lower quartile counts, because other load only adds time.

    Raises:
        UserError: the run uses tensor parallelism, or an engine other than Megatron.
    """
    if config.training.engine != "megatron":
        raise UserError(
            "--measure supports only the Megatron engine, not training.engine: "
            f"{config.training.engine}"
        )
    if config.parallel.tensor > 1:
        raise UserError(
            f"--measure uses one process: parallel.tensor = {config.parallel.tensor} must be 1"
        )
    alone = _shallow(config, _FEW)
    with start(alone.parallel, alone.training, Launch(0, 1, 0, 1)) as runtime:
        engines = [_engine(run, runtime) for run in (alone, _shallow(config, _MANY))]
        batch = random_batch(alone).to(runtime.device)
        for engine in engines:
            engine.train_step([batch], 1, 0.0)
        clock = _Clock(runtime.device)
        rows = [
            [_pass(clock, engine, batch) + _update(clock, engine) for engine in engines]
            + [_embedding(clock, engines[0], batch)]
            for _ in range(samples)
        ]
    few, many, embedding = (
        [statistics.quantiles(column, n=4)[0] for column in zip(*one, strict=True)]
        for one in zip(*rows, strict=True)
    )
    block = [(b - a) / (_MANY - _FEW) for a, b in zip(few, many, strict=True)]
    rest = [a - _FEW * one for a, one in zip(few, block, strict=True)]
    forward, backward = embedding
    # Not measured: as large beside the forward pass as predicted.
    kernel: Kernel = "torch" if runtime.device.type == "cpu" else "triton"
    predicted = predicted_times(model_costs(alone, kernel), this_device(runtime.device))
    light = block[0] * predicted.light / predicted.block.forward
    return Measured(
        UnitTimes(
            embedding=Times(forward, backward),
            block=Times(block[0], block[1]),
            # Noise can make the difference negative.
            head=Times(max(0.0, rest[0] - forward), max(0.0, rest[1] - backward)),
            light=light,
        ),
        update_block=block[2],
        update_embedding=rest[2] / 2,  # the update treats embedding and head the same
    )


def _shallow(config: RunConfig, blocks: int) -> RunConfig:
    parallel = config.parallel.model_copy(
        update={
            "sequence": False,
            "pipeline": 1,
            "virtual_pipeline": 1,
            "layout": None,
            "recompute": "none",
        }
    )
    model = config.model.model_copy(update={"blocks": blocks})
    return config.model_copy(update={"model": model, "parallel": parallel})


def _engine(config: RunConfig, runtime: Runtime) -> MegatronEngine:
    """Build the model with the run's compilation and CUDA graphs."""
    engine = build_engine(config, runtime, build_model(config, runtime))
    assert isinstance(engine, MegatronEngine)
    return engine


class _Clock:
    """Measures the time of a call, including its work on the device."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], None] = (
            torch.cuda.synchronize if device.type == "cuda" else lambda: None
        )

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        self._wait()
        started = time.perf_counter()
        result = call()
        self._wait()
        return time.perf_counter() - started, result


def _pass(clock: _Clock, engine: MegatronEngine, batch: Batch) -> tuple[float, float]:
    """Forward and backward pass of one micro-batch through the whole model."""
    model: Any = engine.model[0]

    def loss_of_batch() -> Tensor:
        return mean_loss(forward(model, batch), None, None)

    ahead, loss = clock(loss_of_batch)
    back, _nothing = clock(loss.backward)
    return ahead, back


def _embedding(clock: _Clock, engine: MegatronEngine, batch: Batch) -> tuple[float, float]:
    """Forward and backward pass through only the embedding."""
    model: Any = engine.chunks[0]
    ahead, stream = clock(lambda: model.embedding(batch.tokens, batch.position_ids))
    gradient = torch.ones_like(stream)
    back, _nothing = clock(lambda: stream.backward(gradient))
    return ahead, back


def _update(clock: _Clock, engine: MegatronEngine) -> tuple[float]:
    """The update after the passes: reduce, clip and apply gradients, then zero them."""
    return (clock(lambda: engine.update(0.0))[0],)
