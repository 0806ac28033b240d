"""Batches that hold only what a pipeline stage uses."""

from __future__ import annotations

from typing import Any

from tests.distributed import run_ranks
from tests.settings import settings


def losses(sections: dict[str, Any]) -> tuple[float, float]:
    """The loss of a step from zero learning rate: with whole batches, and with the stage's part."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start
    from tests.training.ranks import made_up_batches

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = MegatronEngine(config, runtime, build_model(config, runtime))
        whole = made_up_batches(config, runtime, 0)
        rank, last = runtime.pipeline_rank, runtime.pipeline_size - 1
        part = [batch.only(tokens=rank == 0, labels=rank == last) for batch in whole]
        first, second = (engine.train_step(b, len(b), 0.0).loss for b in (whole, part))
        return first, second


def test_a_middle_stage_needs_no_batch() -> None:
    for whole, part in run_ranks(3, losses, settings(model__blocks=3, parallel__pipeline=3)):
        assert whole == part
