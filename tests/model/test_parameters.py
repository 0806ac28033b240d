"""The count of parameters that plans rely on is that of the models that are built."""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.architecture.residual import RULES
from keel_megatron.config.run import RunConfig
from tests.distributed import run_ranks
from tests.settings import settings

VARIANTS: list[dict[str, Any]] = [
    *({"model__residual": rule} for rule in RULES),
    {"model__first_block": "v1"},
    {"model__residual": "peri_ln", "model__embedding_norm": True},
    {"model__final_norm": False},
    {"model__qk_norm": True},
    {"model__tie_embeddings": True, "model__num_query_groups": 2},
]


def built_and_counted(variants: list[dict[str, Any]]) -> list[tuple[int, int]]:
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    pairs = []
    for overrides in variants:
        config = RunConfig.model_validate(settings(**overrides))
        with start(config.parallel, config.training) as runtime:
            (chunk,) = build_model(config, runtime)
            built = sum(parameter.numel() for parameter in chunk.parameters())
        pairs.append((built, parameter_count(config.model, config.data.vocab_size)))
    return pairs


@pytest.fixture(scope="module")
def pairs() -> list[tuple[int, int]]:
    return run_ranks(1, built_and_counted, VARIANTS)[0]


@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_the_count_is_exact(pairs: list[tuple[int, int]], number: int) -> None:
    built, counted = pairs[number]
    assert built == counted, VARIANTS[number]
