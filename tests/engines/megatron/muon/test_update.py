"""Muon's update of stacks of weights, against plain implementations."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from keel_megatron.architecture.block_weights import BlockWeight, block_weights
from keel_megatron.config.model import ModelConfig
from keel_megatron.engines.megatron.muon import shards
from keel_megatron.engines.megatron.muon.orthogonalize import orthogonalize
from keel_megatron.engines.megatron.muon.update import Settings, Stack, update
from keel_megatron.huggingface.naming import parameters
from keel_megatron.layout import newton_schulz
from tests.distributed import run_ranks
from tests.engines.megatron.muon.reference import Muon

MODEL = ModelConfig(
    blocks=3, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, num_query_groups=2
)
SETTINGS = Settings(0.02, 0.1, 0.95, True, 5, "match_rms_adamw")


def stacks(tensor: int = 1, rank: int = 0, blocks: int = 3) -> list[Stack]:
    """Every weight of a few blocks, with seeded values; a tensor rank's shards of them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for weight in block_weights(MODEL):
        values = torch.randn(3, blocks, *weight.shape, generator=generator)
        values[1] *= 1e-3
        values[2] = 0.0  # the momentum starts there
        cut = [shard(weight, one, tensor, rank) for one in values]
        found.append(Stack(weight, *cut, torch.ones(blocks), torch.ones(blocks)))
    return found


def shard(weight: BlockWeight, stack: Tensor, tensor: int, rank: int) -> Tensor:
    """What a tensor rank holds of [n, rows, columns], by what the configuration says of it."""
    if weight.name == "linear_qkv":  # whole query groups
        return stack.chunk(tensor, dim=1)[rank].contiguous()
    if weight.name == "linear_fc1":  # some of the gate, then as much of the values
        return torch.cat([part.chunk(tensor, dim=1)[rank] for part in stack.chunk(2, 1)], dim=1)
    return stack.chunk(tensor, dim=2)[rank].contiguous()


def operators(call: Callable[[], None]) -> Counter[str]:
    """How often a call runs each of torch's operators."""
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            counts[str(func).rsplit(".", 1)[0]] += not func.is_view
            return func(*args, **(kwargs or {}))

    with Count():
        call()
    return counts


def matrices(name: str, weights: Tensor) -> list[Tensor]:
    """The matrices of each weight, as a Hugging Face folder has them."""
    fused = {one.name.split(".")[-2]: one for one in parameters(MODEL, 8) if "linear" in one.name}
    return [matrix for weight in weights for matrix in fused[name].split(weight)]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_steps_equal_the_equations(nesterov: bool, adjust_lr_fn: str) -> None:
    settings = replace(SETTINGS, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    for stack in stacks():
        name = stack.weight.name
        plain = [
            Muon(
                matrix,
                lr=0.02,
                weight_decay=0.1,
                momentum=0.95,
                nesterov=nesterov,
                steps=5,
                match=adjust_lr_fn == "match_rms_adamw",
            )
            for matrix in matrices(name, stack.masters)
        ]
        for seed in range(2):
            torch.manual_seed(seed)
            stack.gradients.normal_()
            for one, gradient in zip(plain, matrices(name, stack.gradients), strict=True):
                one.step(gradient)
            update([stack], settings, torch.float32)
        found = matrices(name, stack.masters)
        assert len(found) == 3 * len(stack.weight.rows)
        for matrix, one in zip(found, plain, strict=True):
            torch.testing.assert_close(matrix.double(), one.matrix, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_steps_equal_torchs_within_bf16(adjust_lr_fn: str, dtype: torch.dtype) -> None:
    """torch.optim.Muon multiplies in bf16, which moves an update by 1.5 %."""
    settings = replace(SETTINGS, adjust_lr_fn=adjust_lr_fn)
    for stack in stacks():
        name, start = stack.weight.name, stack.masters.clone()
        before = matrices(name, start)
        theirs = [torch.nn.Parameter(matrix.clone()) for matrix in before]
        for parameter, gradient in zip(theirs, matrices(name, stack.gradients), strict=True):
            parameter.grad = gradient.clone()
        torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn=adjust_lr_fn).step()
        update([stack], settings, dtype)
        for ours, other, matrix in zip(matrices(name, stack.masters), theirs, before, strict=True):
            moved = float((other.detach() - matrix).norm())
            assert float((ours - other.detach()).norm()) < 0.03 * moved, name


def test_blocks_have_rates_and_decays_of_their_own() -> None:
    for stack in stacks():
        uniform = copy.deepcopy(stack)
        stack.rates.copy_(torch.tensor([1.0, 0.5, 0.0]))
        stack.decays.copy_(torch.tensor([1.0, 0.0, 1.0]))
        start = stack.masters.clone()
        update([uniform], SETTINGS, torch.float32)
        update([stack], SETTINGS, torch.float32)
        undecayed = uniform.masters + 0.02 * 0.1 * start
        expected = (uniform.masters[0], (start[1] + undecayed[1]) / 2, start[2])
        torch.testing.assert_close(stack.masters, torch.stack(expected))


def test_batches_are_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = stacks(), stacks()
    few = operators(lambda: update(whole, SETTINGS, torch.float32))
    monkeypatch.setattr(newton_schulz, "TEMPORARY_BYTES", 1)
    many = operators(lambda: update(cut, SETTINGS, torch.float32))
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one.masters, other.masters)
    assert many["aten.baddbmm"] == 3 * few["aten.baddbmm"] == 3 * 2 * 5 * 7


def test_the_number_of_operators_does_not_depend_on_the_number_of_blocks() -> None:
    few, many = (
        operators(lambda given=given: update(given, SETTINGS, torch.float32))  # type: ignore[misc]
        for given in (stacks(blocks=2), stacks(blocks=64))
    )
    assert few == many
    assert sum(many.values()) < 250


def test_a_zero_or_tiny_matrix_gives_no_nan() -> None:
    x = torch.zeros(2, 4, 6)
    x[1] = 1e-30
    assert orthogonalize(x, 5).isfinite().all()


def sharded_update(blocks: int) -> tuple[list[Tensor], list[list[int]]]:
    """A tensor rank's shards after an update, and the shapes that it orthogonalised."""
    dist.init_process_group("gloo")
    tensor_group = dist.group.WORLD
    assert tensor_group is not None
    given = stacks(tensor_group.size(), tensor_group.rank(), blocks)
    seen: list[list[int]] = []

    def noted(x: Tensor, steps: int) -> Tensor:
        seen.append(list(x.shape))
        return orthogonalize(x, steps)

    shards.orthogonalize = noted
    update(given, SETTINGS, torch.float32, tensor_group)
    dist.destroy_process_group()
    return [stack.masters for stack in given], seen


def test_shards_of_a_tensor_group_are_updated_as_whole_matrices() -> None:
    """Three blocks: one of two ranks has two of each batch."""
    whole = stacks()
    update(whole, SETTINGS, torch.float32)
    ranks = run_ranks(2, sharded_update, 3)
    for rank, (found, seen) in enumerate(ranks):
        for stack, masters in zip(whole, found, strict=True):
            expected = shard(stack.weight, stack.masters, 2, rank)
            torch.testing.assert_close(masters, expected, rtol=0, atol=1e-6)
        shapes = [matrix for stack in whole for matrix in stack.weight.matrices]
        assert seen == [[2 - rank, *shape] for shape in shapes]
