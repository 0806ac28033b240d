"""Owners of Muon's weights: each has one, with as much to do as others, and regions hold them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from keel_megatron.architecture.block_weights import block_weights
from keel_megatron.config.model import ModelConfig
from keel_megatron.layout.matrix_owners import regions
from keel_megatron.layout.newton_schulz import flops

MODEL = ModelConfig(
    blocks=8, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, num_query_groups=2
)
KINDS = block_weights(MODEL)


def cost(weight: object) -> float:
    return sum(flops(*matrix, steps=1) for matrix in weight.matrices)  # type: ignore[attr-defined]


@given(blocks=st.integers(1, 40), replicas=st.integers(1, 12), tensor=st.sampled_from([1, 2]))
def test_every_weight_has_one_owner_and_a_place(blocks: int, replicas: int, tensor: int) -> None:
    found = regions(KINDS, blocks, replicas, tensor)
    assert len(found.owners) == replicas
    owned = [(o.weight.name, b) for stacks in found.owners for o in stacks for b in o.blocks]
    assert sorted(owned) == sorted((w.name, b) for w in KINDS for b in range(blocks))
    for stacks in found.owners:
        end = 0
        for one in stacks:
            assert one.start >= end
            assert one.start % 64 == 0
            assert list(one.blocks) == sorted(one.blocks)
            end = one.start + len(one.blocks) * one.weight.shard(tensor).numel
        assert end <= found.length
    assert found.length % 64 == 0


@given(blocks=st.integers(1, 40), replicas=st.integers(1, 12))
def test_no_owner_has_more_to_do_than_one_weight_beyond_its_share(
    blocks: int, replicas: int
) -> None:
    loads = [
        sum(cost(one.weight) * len(one.blocks) for one in stacks)
        for stacks in regions(KINDS, blocks, replicas).owners
    ]
    assert max(loads) - min(loads) <= max(map(cost, KINDS))


def test_many_blocks_leave_little_padding() -> None:
    found = regions(KINDS, 512, 8)
    whole = 512 * sum(weight.numel for weight in KINDS)
    assert found.length * 8 <= 1.01 * whole
