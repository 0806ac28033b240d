"""Megatron-core's generators on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from tests.distributed import run_ranks
from tests.settings import settings


def drawn(sections: dict[str, Any]) -> list[list[float]]:
    """Numbers from outside of the tracked generator, within it, outside and within again."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from keel_megatron.config.run import RunConfig
    from keel_megatron.runtime.distributed import start
    from keel_megatron.runtime.seeds import seed_dropout

    config = RunConfig.model_validate(sections)
    found = []
    with start(config.parallel, config.training):
        for within in (True, False):
            seed_dropout(1, 0, 0)
            found.append(torch.rand(2).tolist())
            if within:
                with get_cuda_rng_tracker().fork():
                    found.append(torch.rand(2).tolist())
            found.append(torch.rand(2).tolist())
    return found


def test_forked_generators_draw_from_the_cpus() -> None:
    """Within a fork other numbers come; outside it is as if there had been none."""
    ((first, within, after, again, following),) = run_ranks(1, drawn, settings())
    assert first == again
    assert after == following
    assert within not in (first, after)
