"""Modules that Megatron-core builds."""

from __future__ import annotations

from typing import Any

from tests.distributed import run_ranks
from tests.settings import settings


def built(sections: dict[str, Any]) -> list[tuple[int, ...]]:
    """Shapes of an MLP's weights, built with what each version's layer passes."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.mlp import MLPSubmodules

    from keel_megatron.config.run import RunConfig
    from keel_megatron.model.language_model import build_model
    from keel_megatron.model.linear import ColumnParallelLinear, RowParallelLinear
    from keel_megatron.model.mlp import MLP
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        (chunk,) = build_model(config, runtime)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        passed: list[dict[str, Any]] = [
            {},
            {"pg_collection": groups, "is_mtp_layer": False, "name": None},
        ]
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlps = [MLP(chunk.config, parts, **arguments) for arguments in passed]
        return [tuple(weight.shape) for mlp in mlps for weight in mlp.parameters()]


def test_an_mlp_is_built_by_any_version() -> None:
    (found,) = run_ranks(1, built, settings(model__blocks=1))
    assert found == [(256, 64), (64, 128)] * 2
