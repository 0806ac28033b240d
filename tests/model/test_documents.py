"""Packed documents with masks: the losses and gradients of every document by itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from keel_megatron.config.checks import problems
from keel_megatron.engines.base import forward
from keel_megatron.model import compiled
from keel_megatron.model.attention import SdpaAttention, causal_attention
from keel_megatron.model.documents import Documents, Packed
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


PACKED = {name: WAYS[name] for name in ("plain", "full recomputation", "compiled")}
"""What the kernel for documents one after another is tried with."""


def packed_and_separate(ways: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Of every way the largest relative error of a loss and of a parameter's gradient."""
    return [_errors(overrides) for overrides in ways]


def in_a_packed_kernel(ways: list[dict[str, Any]]) -> tuple[list[tuple[float, float]], int, int]:
    """The same with CUDA's operator computed here; how often it ran, and dynamo's graphs."""
    from torch._dynamo.utils import counters

    calls = []
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", partial(flash_forward, calls), "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Documents, "within", lambda own, *_: Packed(own.borders, own.longest))
        return packed_and_separate(ways), len(calls), counters["stats"]["unique_graphs"]


def flash_forward(calls: list[int], *operands: Any, **_options: Any) -> tuple[Tensor, ...]:
    """The operator as its callers know it."""
    query, key, value, borders, other_borders, longest, other_longest, dropout, causal, _ = operands
    assert torch.equal(borders, other_borders)
    assert longest == other_longest >= borders.diff().max()
    assert causal
    assert not dropout
    calls.append(1)
    out = torch.empty_like(query)
    for here, weights in _weights(query, key, borders):
        out[here] = torch.einsum("hqk,khd->qhd", weights, _every_head(value[here], query))
    sums = query.new_zeros(query.size(1), query.size(0), dtype=torch.float32)
    return out, sums, sums.new_zeros(2, dtype=torch.uint64), sums.new_zeros(0), sums.new_zeros(0)


def flash_backward(d_out: Tensor, *operands: Any, **_options: Any) -> tuple[Tensor, ...]:
    """The gradients of query, key and value."""
    query, key, value, borders = *operands[:3], operands[5]
    found = tuple(torch.zeros_like(one) for one in (query, key, value))
    for here, weights in _weights(query, key, borders):
        d = torch.einsum("qhd,khd->hqk", d_out[here], _every_head(value[here], query))
        d = weights * (d - (d * weights).sum(-1, keepdim=True)) / query.size(-1) ** 0.5
        found[0][here] = torch.einsum("hqk,khd->qhd", d, _every_head(key[here], query))
        for one, parts, rows in ((found[1], d, query), (found[2], weights, d_out)):
            whole = torch.einsum("hqk,qhd->khd", parts, rows[here])
            one[here] = whole.unflatten(1, (key.size(1), -1)).sum(2)
    return found


def _weights(query: Tensor, key: Tensor, borders: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Where a document is, and its weights [heads, queries, keys]."""
    for start, stop in itertools.pairwise(borders.tolist()):
        here = slice(start, stop)
        scores = torch.einsum("qhd,khd->hqk", query[here], _every_head(key[here], query))
        future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        scores = (scores / query.size(-1) ** 0.5).masked_fill(future, -torch.inf)
        yield here, scores.softmax(-1)


def _every_head(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.size(1) // x.size(1), 1)


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
        other, batch = (batch._bordered() for batch in made_up_batches(config, runtime, 0)[1:3])
        assert other.borders.shape != batch.borders.shape  # type: ignore[union-attr]
        forward(chunk, other).sum().backward()
        chunk.zero_grad()
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


def test_cudas_kernel_is_given_the_documents_one_after_another() -> None:
    """One graph of compiled blocks serves micro-batches of any number of documents."""
    ((found, calls, graphs),) = run_ranks(1, in_a_packed_kernel, list(PACKED.values()))
    for way, (loss, gradient) in zip(PACKED, found, strict=True):
        assert loss < 1e-5, way
        assert gradient < 1e-5, way
    blocks, micro_batches = 3, 2
    assert calls == micro_batches * blocks * 4  # twice with full recomputation
    assert graphs == 3  # the first block, the next one and the last


@pytest.mark.parametrize("document_masks", [False, True])
def test_transformer_engine_is_refused(document_masks: bool) -> None:
    config = small_config(
        data__document_masks=document_masks, kernels__backend="transformer_engine"
    )
    assert list(dict(problems(config))) == ["data.document_masks"] * document_masks


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
