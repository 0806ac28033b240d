"""Initial weights: bit for bit the same at every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keel_megatron.config.run import RunConfig
from tests.distributed import run_ranks
from tests.settings import settings

Shards = dict[str, tuple[torch.Tensor, int | None, int, int]]


def local_weights(sections: dict[str, dict[str, Any]]) -> Shards:
    """Weights of this rank: name -> (shard, dimension it is split along, stride, tensor rank)."""
    from keel_megatron.model.initialization import global_parameters
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        return {
            name: (
                parameter.detach().clone(),
                parameter.partition_dim  # type: ignore[attr-defined]
                if getattr(parameter, "tensor_model_parallel", False)
                else None,
                getattr(parameter, "partition_stride", 1),
                runtime.tensor_rank,
            )
            for chunk in build_model(config, runtime)
            for name, parameter in global_parameters(chunk, tied=config.model.tie_embeddings)
        }


def gathered(world_size: int, **overrides: Any) -> dict[str, torch.Tensor]:
    """The whole model's weights, put together from all ranks' shards."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    places: dict[str, tuple[int | None, int]] = {}
    for rank in run_ranks(world_size, local_weights, settings(**overrides)):
        for name, (shard, dim, stride, tensor_rank) in rank.items():
            known = parts.setdefault(name, {})
            if tensor_rank in known:
                assert torch.equal(known[tensor_rank], shard), f"{name}: copies differ"
            known[tensor_rank] = shard
            places[name] = (dim, stride)
    return {name: join(list(shards.values()), *places[name]) for name, shards in parts.items()}


def join(shards: list[torch.Tensor], dim: int | None, stride: int) -> torch.Tensor:
    if dim is None:
        assert all(torch.equal(shard, shards[0]) for shard in shards)
        return shards[0]
    pieces = [shard.chunk(stride, dim=dim) for shard in shards]
    return torch.cat([piece[i] for i in range(stride) for piece in pieces], dim=dim)


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return gathered(1)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, {"parallel__tensor": 2}),
        (4, {"parallel__tensor": 4}),
        (2, {"parallel__pipeline": 2}),
        (4, {"parallel__pipeline": 4}),
        (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    ],
)
def test_every_layout_starts_from_the_same_weights(
    alone: dict[str, torch.Tensor], world_size: int, overrides: dict[str, Any]
) -> None:
    weights = gathered(world_size, **overrides)
    assert weights.keys() == alone.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, alone[name]), name


def test_tied_copies_are_equal_across_stages() -> None:
    weights = gathered(2, parallel__pipeline=2, model__tie_embeddings=True)
    assert "output_layer.weight" not in weights


def test_weights_are_normal_with_the_configured_deviation(alone: dict[str, torch.Tensor]) -> None:
    """N(0, 0.02) everywhere, output projections included; gains at 1; no two matrices alike."""
    seen = set()
    for name, weight in alone.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        deviation = 0.02 / (2 * weight.numel()) ** 0.5
        assert weight.std().item() == pytest.approx(0.02, abs=6 * deviation), name
        assert abs(weight.mean().item()) < 6 * 0.02 / weight.numel() ** 0.5, name
        seen.add(weight.flatten()[0].item())
    assert len(seen) == sum(weight.dim() == 2 for weight in alone.values())


def test_the_seed_changes_the_weights(alone: dict[str, torch.Tensor]) -> None:
    other = gathered(1, training__seed=5)
    assert not torch.equal(other["output_layer.weight"], alone["output_layer.weight"])
