"""Times of a model's pieces: they add up to the model's, and a plan by them is what runs.

Time is the work of torch's operators here (tests/virtual_time.py), so that no other load is in it.
`python tools/simulator_check.py` compares the same by the hour, on an idle machine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import random_batch
from keel_megatron.engines.megatron.engine import MegatronEngine
from keel_megatron.errors import UserError
from keel_megatron.layout.devices import device_named
from keel_megatron.planner import measure
from keel_megatron.planner.measure import measure_pieces
from keel_megatron.planner.plan import Measured, make_plan
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.distributed import run_ranks
from tests.settings import settings, small_config
from tests.virtual_time import VirtualClock, Work

SHAPE: dict[str, Any] = {"model__blocks": 16, "data__seq_length": 128, "data__vocab_size": 4096}
LAYOUTS: dict[str, dict[str, Any]] = {
    "1F1B": {"parallel__layout": [8, 8]},
    "1F1B, uneven": {"parallel__layout": [11, 5]},
    "1F1B, recomputed": {"parallel__layout": [8, 8], "parallel__recompute": "full"},
    "interleaved": {"parallel__layout": [4, 4, 4, 4], "parallel__virtual_pipeline": 2},
}


def measured_work(config: RunConfig) -> Measured:
    """`measure_pieces` with work in place of seconds."""
    clock = VirtualClock()
    with pytest.MonkeyPatch.context() as patch, Work(clock):
        patch.setattr(measure.time, "perf_counter", clock)
        return measure_pieces(config, samples=2)


def measured_and_run() -> tuple[Measured, float]:
    """The pieces' work, and that of a step of the whole model in the same process."""
    from keel_megatron.model.language_model import build_model

    config = RunConfig.model_validate(settings(**SHAPE))
    pieces = measured_work(config)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        engine = MegatronEngine(config, runtime, build_model(config, runtime))
        batch, clock = random_batch(config), VirtualClock()
        engine.train_step([batch] * 4, 4, 0.0)
        with Work(clock):
            engine.train_step([batch] * 4, 4, 0.0)
        return pieces, clock.now


def test_the_pieces_add_up_to_the_model() -> None:
    ((pieces, step),) = run_ranks(1, measured_and_run)
    times = pieces.times
    passes = 16 * times.block.total + times.embedding.total + times.head.total
    predicted = 4 * passes + 16 * pieces.update_block + 2 * pieces.update_embedding
    assert predicted == pytest.approx(step, rel=0.002)
    assert times.block.backward > times.block.forward > 0
    # 4096 rows of logits cost more than one block of hidden size 64, looking them up less.
    assert times.head.total > times.block.total > times.embedding.forward


def pipelined() -> list[float]:
    """When this rank's step of each layout is done."""
    from keel_megatron.model.language_model import build_model

    found = []
    for name, layout in LAYOUTS.items():
        config = RunConfig.model_validate(settings(**SHAPE, parallel__pipeline=2, **layout))
        with start(config.parallel, config.training) as runtime:
            engine = MegatronEngine(config, runtime, build_model(config, runtime))
            batches = [random_batch(config)] * 8
            engine.train_step(batches, 8, 0.0)
            store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
            clock = VirtualClock(store)
            with clock.on_messages(), Work(clock):
                engine.train_step(batches, 8, 0.0)
            found.append(clock.now)
            runtime.barrier()
    return found


def plans() -> list[float]:
    """What `keel plan --measure` says of each layout's step."""
    found = []
    for layout in LAYOUTS.values():
        config = RunConfig.model_validate(settings(**SHAPE, parallel__pipeline=2, **layout))
        measured = measured_work(config)
        found.append(make_plan(config, 2, device_named("cpu"), measured).step_seconds)
    return found


def test_a_step_on_two_stages_takes_what_its_plan_says() -> None:
    ranks = run_ranks(2, pipelined)
    (planned,) = run_ranks(1, plans)
    for name, *done, plan in zip(LAYOUTS, *ranks, planned, strict=True):
        assert plan == pytest.approx(max(done), rel=0.005), name


def test_tensor_parallelism_needs_more_than_one_process() -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor = 2 must be 1"):
        measure_pieces(small_config(parallel__tensor=2))
