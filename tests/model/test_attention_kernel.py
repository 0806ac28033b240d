"""Which attention kernel torch is told to take, with a stand-in for the device."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from keel_megatron.model import attention, attention_kernel
from keel_megatron.model.attention_kernel import (
    attention_order,
    describe_attention,
    prefer_attention,
)
from tests.settings import small_config

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
CUDA = torch.device("cuda", 0)
A100, H100, B200, RTX = (8, 0), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize(
    ("chosen", "length", "capability", "first"),
    [
        ("auto", 4096, H100, CUDNN),
        ("auto", 4096, B200, CUDNN),
        ("auto", 4096, A100, None),
        ("auto", 4096, RTX, None),
        ("auto", 4000, H100, None),
        ("cudnn", 4000, A100, CUDNN),
        ("flash", 4096, H100, FLASH),
    ],
)
def test_the_first_kernel(
    chosen: str, length: int, capability: tuple[int, int], first: SDPBackend | None
) -> None:
    config = small_config(kernels__attention=chosen, data__seq_length=length)
    order = attention_order(config, capability)
    assert (None if order is None else order[0]) == first
    if order is not None:
        assert set(order) == {CUDNN, FLASH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A device whose torch takes the first kernel of the order; as torch does on such a device, it
    sets an order of its own when it first chooses."""
    before = torch._C._get_sdp_priority_order()
    seen = SimpleNamespace(shapes=[], started=False)

    def choice(query: Any, key: Any, *_: Any, **__: Any) -> int:
        seen.shapes.append((query.shape, key.shape, query.dtype))
        if not seen.started:
            torch._C._set_sdp_priority_order([1, 3, 2, 0, 4])
        seen.started = True
        return torch._C._get_sdp_priority_order()[0]

    empty = torch.empty
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **(k | {"device": "cpu"})))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: H100)
    attention_kernel._own_order.cache_clear()
    yield seen
    attention_kernel._own_order.cache_clear()
    torch._C._set_sdp_priority_order(before)


def test_the_order_is_set_and_named(h100: SimpleNamespace) -> None:
    def named(**settings: Any) -> str:
        values = {"data__seq_length": 128, "training__precision": "bf16", **settings}
        return describe_attention(small_config(**values), CUDA)

    assert named() == "cuDNN's kernel"
    assert named(kernels__attention="flash") == "FlashAttention-2"
    assert torch._C._get_sdp_priority_order() == [1, 2, 0, 3, 4]
    named(data__seq_length=100)  # torch's own order again
    assert torch._C._get_sdp_priority_order() == [1, 3, 2, 0, 4]
    assert "Transformer Engine" in named(kernels__backend="transformer_engine")
    assert named(data__document_masks=True) == "FlashAttention-2 within documents"


def test_the_choice_is_for_the_runs_shape(h100: SimpleNamespace) -> None:
    settings: dict[str, Any] = {"model__num_query_groups": 2, "parallel__tensor": 2}
    prefer_attention(small_config(**settings, training__precision="bf16"), CUDA)
    assert h100.shapes[-1] == ((2, 2, 32, 16), (2, 1, 32, 16), torch.bfloat16)
    prefer_attention(small_config(**settings), CUDA)  # fp32: keys for every head
    assert h100.shapes[-1] == ((2, 2, 32, 16), (2, 2, 32, 16), torch.float32)


def test_a_cpu_is_left_alone() -> None:
    before = torch._C._get_sdp_priority_order()
    text = describe_attention(small_config(kernels__attention="cudnn"), torch.device("cpu"))
    assert text == "torch's flash kernel for CPUs"
    text = describe_attention(small_config(data__document_masks=True), torch.device("cpu"))
    assert text == "torch's, with a mask of documents in memory"
    assert torch._C._get_sdp_priority_order() == before


def test_cuda_that_is_traced_by_a_cpu_build_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a torch has no CUDA kernels to choose from, and asking it raises."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: H100)
    prefer_attention(small_config(data__seq_length=128), CUDA)


def test_repeated_keys_are_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA in fp32."""
    q, k, v = (torch.randn(8, 2, n, 4, requires_grad=True) for n in (4, 2, 2))

    def passes() -> list[torch.Tensor]:
        out = attention.causal_attention(q, k, v)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    expected = passes()
    assert attention.expands_groups(CUDA, torch.float32)
    assert not attention.expands_groups(CUDA, torch.bfloat16)
    assert not attention.expands_groups(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(attention, "expands_groups", lambda *_: True)
    for found, other in zip(passes(), expected, strict=True):
        torch.testing.assert_close(found, other)
