"""Bytes that a rank really holds for weights, gradients and optimizer, against the prediction."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.settings import settings

CASES: list[dict[str, Any]] = [
    {"training__precision": "bf16", "parallel__pipeline": 2},
    {"training__precision": "fp32", "parallel__pipeline": 2, "model__tie_embeddings": True},
    {"training__precision": "bf16", "parallel__tensor": 2},
    {"training__precision": "bf16"},
    {"training__precision": "bf16", "parallel__distributed_optimizer": False},
    {"training__precision": "fp32"},
]


def held(cases: list[dict[str, Any]]) -> list[list[tuple[int, int]]]:
    """(held, predicted) bytes of parameters, gradients and optimizer state on this rank."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.layout.stages import own_partition
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    found = []
    for case in cases:
        # Wide enough that the padding of Megatron-core's buffers is below a hundredth.
        config = RunConfig.model_validate(
            settings(**case, model__hidden_size=128, model__ffn_hidden_size=256)
        )
        with start(config.parallel, config.training) as runtime:
            engine = MegatronEngine(config, runtime, build_model(config, runtime))
            memory = own_partition(config, runtime).stages[runtime.pipeline_rank].memory
            model = [p for chunk in engine.chunks for p in chunk.parameters()]
            buffers = [b for chunk in engine.model for b in chunk.buffers]
            known = {p.untyped_storage().data_ptr() for p in model}
            states = 0
            for inner in engine.optimizer.chained_optimizers:
                for parameter, state in inner.optimizer.state.items():
                    states += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
                    # An fp32 master of its own, where it is not the model's.
                    if parameter.untyped_storage().data_ptr() not in known:
                        states += parameter.nbytes
            found.append(
                [
                    (sum(p.nbytes for p in model), memory.parameters),
                    (sum(b.grad_data.nbytes for b in buffers), memory.gradients),
                    (states, memory.optimizer),
                ]
            )
    return found


def test_a_rank_holds_what_is_predicted() -> None:
    for rank in run_ranks(2, held, CASES):
        for case, kinds in zip(CASES, rank, strict=True):
            for here, predicted in kinds:
                assert here == pytest.approx(predicted, rel=1e-2), case
