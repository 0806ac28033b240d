"""A model with several streams starts as pre-norm's."""

from __future__ import annotations

import torch
from torch import Tensor

from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.settings import small_config
from tests.training.ranks import made_up_batches


def losses(**overrides: object) -> Tensor:
    """Of a micro-batch, at initialization."""
    from keel_megatron.model.language_model import build_model

    config = small_config(model__blocks=3, **overrides)
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (chunk,) = build_model(config, runtime)
        batch = made_up_batches(config, runtime, 0)[0]
        with torch.no_grad():
            found: Tensor = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels)
        return found


def test_at_first_every_stream_is_pre_norms() -> None:
    """Four times its stream goes to the final norm, which differs by epsilon alone."""
    expected = losses(model__residual="pre_ln", model__norm_epsilon=1e-12)
    for n in (2, 4):
        found = losses(
            model__residual="hyper_connections",
            model__expansion_rate=n,
            model__norm_epsilon=1e-12,
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
