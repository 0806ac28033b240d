"""Packed documents with masks: the losses and gradients of every document by itself."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from keel_megatron.engines.base import forward
from keel_megatron.model import compiled
from keel_megatron.model.attention import SdpaAttention, causal_attention
from keel_megatron.model.documents import Documents
from keel_megatron.model.rotary import RotaryTable, apply_rotary
from tests.distributed import run_ranks
from tests.settings import small_config
from tests.training.ranks import made_up_batches, made_up_documents

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms of heads": {"model__residual": "hybrid_norm"},
    "full recomputation": {"parallel__recompute": "full"},
    "light recomputation": {"parallel__recompute": "light"},
    "compiled": {"kernels__compile": True},
    "compiled, recomputed": {"kernels__compile": True, "parallel__recompute": "full"},
}


def packed_and_separate(ways: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Of every way the largest relative error of a loss and of a parameter's gradient."""
    return [_errors(overrides) for overrides in ways]


def _errors(overrides: dict[str, Any]) -> tuple[float, float]:
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = small_config(
        model__blocks=3, model__num_query_groups=2, data__document_masks=True, **overrides
    )
    with start(config.parallel, config.training) as runtime, pytest.MonkeyPatch.context() as patch:
        (chunk,) = build_model(config, runtime)
        if config.kernels.compile:
            patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
            compiled.compile_blocks([chunk], runtime.device)
        batch = made_up_batches(config, runtime, 0)[0]
        packed = forward(chunk, batch)
        packed.sum().backward()
        gradients = {name: p.grad.clone() for name, p in chunk.named_parameters()}
        chunk.zero_grad()
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            layer.compiled = None
        apart = torch.zeros_like(packed)
        for row, numbers in enumerate(batch.documents):  # type: ignore[arg-type]
            for number in range(int(numbers[-1]) + 1):
                place = (slice(row, row + 1), numbers == number)
                tokens, labels = batch.tokens[place], batch.labels[place]  # type: ignore[index]
                losses = chunk(tokens, None, None, labels=labels)
                losses.sum().backward()
                apart[place] = losses.detach()
        return (
            float(((packed - apart) / apart).abs().max()),
            max(
                float((gradients[name] - p.grad).norm() / p.grad.norm())
                for name, p in chunk.named_parameters()
            ),
        )


def test_packed_documents_are_those_by_themselves() -> None:
    (found,) = run_ranks(1, packed_and_separate, list(WAYS.values()))
    for way, (loss, gradient) in zip(WAYS, found, strict=True):
        assert loss < 1e-5, way
        assert gradient < 1e-5, way


def made_up_heads(s: int, b: int) -> list[Tensor]:
    """Query, key and value of two heads and one group."""
    torch.manual_seed(3)
    return [torch.randn(s, b, heads, 8) for heads in (2, 1, 1)]


def test_positions_need_not_be_reset() -> None:
    """A score depends on the difference of two positions alone."""
    table = RotaryTable(8, 10000.0, 400, torch.float32).table
    query, key, value = made_up_heads(16, 1)
    first, later = (
        causal_attention(apply_rotary(query, part), apply_rotary(key, part), value)
        for part in (table[:, :16], table[:, 371:387])
    )
    torch.testing.assert_close(later, first, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first, causal_attention(query, key, value), atol=1e-2)


def test_attention_stays_within_a_document() -> None:
    s, b = 24, 3
    numbers = made_up_documents(b, s, 1)
    query, key, value = made_up_heads(s, b)
    attention = SdpaAttention(SimpleNamespace(attention_dropout=0.0, sequence_parallel=False))
    found = attention(query, key, value, Documents(numbers))
    changed = value.clone()
    changed[:5] = 100.0  # reaches no other document
    other = attention(query, key, changed, Documents(numbers))
    for row in range(b):
        beyond = numbers[row] > numbers[row, 4]
        assert torch.equal(found[beyond, row], other[beyond, row])
        assert not torch.equal(found[:5, row], other[:5, row])
