"""Counts of parameters and FLOPs against the model itself and against the paper's figures."""

from __future__ import annotations

import pytest

from keel_megatron.architecture.flops import block_forward_flops, training_flops_per_token
from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.config.model import ModelConfig


def paper_model(blocks: int, hidden_size: int, ffn_hidden_size: int) -> ModelConfig:
    return ModelConfig(
        blocks=blocks,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=16,
        num_query_groups=8,
    )


def test_the_papers_sizes() -> None:
    """keel_paper: 256 blocks at d=1024 = 3.22B (body); 1024 sub-layers about 6.4B."""
    body = parameter_count(paper_model(256, 1024, 3072), vocab_size=320) - 2 * 320 * 1024
    assert body == pytest.approx(3.22e9, rel=2e-3)
    wide = parameter_count(paper_model(64, 2048, 6144), vocab_size=320) - 2 * 320 * 2048
    assert wide == pytest.approx(3.22e9, rel=2e-3)
    assert parameter_count(paper_model(512, 1024, 3072), 320) == pytest.approx(6.44e9, rel=2e-3)


def test_flops_are_six_a_parameter_and_token_plus_attention() -> None:
    model = paper_model(4, 1024, 3072)
    body = 4 * (1024 * 64 * 48 + 3 * 1024 * 3072)
    head = 1024 * 32000
    attention = 4 * 3 * 2 * 1024 * (4096 + 1)
    assert training_flops_per_token(model, 4096, 32000) == 6 * (body + head) + attention


def test_a_block_of_the_paper_costs_what_the_field_knows() -> None:
    """About 0.14 TFLOP forward at hidden 1024 and sequence 4096 (a figure measured elsewhere)."""
    total = block_forward_flops(paper_model(1, 1024, 3072), 4096) * 4096
    assert total == pytest.approx(0.137e12, rel=0.05)
