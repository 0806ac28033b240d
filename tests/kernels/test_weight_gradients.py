"""Weight gradients added to Megatron-core's sums by their products, alone and under its DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from keel_megatron.kernels import weight_gradients
from keel_megatron.kernels.weight_gradients import (
    add_product,
    adds_directly,
    placeholder,
    return_placeholder,
)
from keel_megatron.model.linear import linear, return_gradient
from tests.distributed import run_ranks
from tests.settings import settings


@pytest.mark.parametrize(
    ("sums", "dtype", "directly"),
    [
        (torch.float32, torch.float32, True),
        (torch.float64, torch.float64, True),
        (torch.float32, torch.bfloat16, False),  # on a CPU
        (torch.float64, torch.float32, False),
    ],
)
def test_a_product_is_added(sums: torch.dtype, dtype: torch.dtype, directly: bool) -> None:
    torch.manual_seed(0)
    total, a, b = torch.ones(3, 4, dtype=sums), torch.randn(3, 5), torch.randn(5, 4)
    assert adds_directly(total, dtype) == directly
    found = add_product(total, a.to(dtype), b.to(dtype))
    assert found.data_ptr() == total.data_ptr()
    expected = 1 + a.to(dtype).double() @ b.to(dtype).double()
    torch.testing.assert_close(total.double(), expected, rtol=2e-2, atol=2e-2)


def test_torch_adds_bf16_products_to_fp32_sums_in_place() -> None:
    """By the operator's schema and shape function; it has no kernel for a CPU."""
    a, b = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (6, 4))
    sums = torch.zeros(6, 4, device="meta")
    add: Any = torch.addmm
    found = add(sums, a, b.t(), out_dtype=torch.float32, out=sums)
    assert (found.dtype, found.shape) == (torch.float32, (6, 4))
    assert found is sums
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::addmm.dtype_out", "Meta")


def test_cuda_adds_with_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def addmm(*given: Any, **options: Any) -> torch.Tensor:
        called.append((given, options))
        return given[0]

    weight_gradients._addmm_takes_fp32_sums.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            monkeypatch.setattr(torch, "addmm", addmm)
            sums = torch.zeros(6, 4, device="cuda")
            a, b = (torch.empty(n, 8, dtype=torch.bfloat16, device="cuda") for n in (6, 4))
            assert adds_directly(sums, torch.bfloat16)
            assert add_product(sums, a, b.t()) is sums
    finally:
        weight_gradients._addmm_takes_fp32_sums.cache_clear()
    assert len(called) == 2  # tried once, then used
    assert called[-1][1] == {"out_dtype": torch.float32, "out": sums}


def test_a_torch_that_refuses_the_sums_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.9's addmm on CUDA wants `self` in the operands' type."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    weight_gradients._addmm_takes_fp32_sums.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            monkeypatch.setattr(torch, "addmm", refuse)
            sums = torch.zeros(2, 2, device="cuda")
            half = torch.zeros(2, 2, device="cuda", dtype=torch.bfloat16)
            assert not adds_directly(sums, torch.bfloat16)
            assert add_product(sums, half, half).dtype == torch.float32
    finally:
        weight_gradients._addmm_takes_fp32_sums.cache_clear()


def test_a_placeholder_is_returned_where_ddp_waits_for_one() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert placeholder(weight) is None
    return_placeholder(weight)
    found = placeholder(weight)
    assert found is not None
    assert found.shape == weight.shape
    weight.zero_out_wgrad = True
    assert torch.equal(placeholder(weight), torch.zeros(2, 3))


@pytest.mark.parametrize("waits", [False, True])
def test_ddps_hook_sees_a_gradient_where_it_waits(waits: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.main_grad = torch.zeros(2, 3)
    if waits:
        return_placeholder(weight)
    seen = []
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: seen.append(weight.grad is not None))
    linear(torch.ones(4, 3), weight).sum().backward()
    assert torch.equal(weight.main_grad, torch.full((2, 3), 4.0))
    assert seen == [waits]


def test_a_captured_weight_returns_its_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.main_grad = torch.zeros(2, 3)
    return_gradient(weight)
    linear(torch.ones(4, 3), weight).sum().backward()
    assert torch.equal(weight.grad, torch.full((2, 3), 4.0))
    assert not weight.main_grad.any()


def reduced_gradients(overlap: bool, tied: bool) -> dict[str, Any]:
    """Summed gradients of two micro-batches of two replicas under Megatron-core's DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from keel_megatron.config.run import RunConfig
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start
    from tests.training.ranks import made_up_batches

    config = RunConfig.model_validate(settings(model__tie_embeddings=tied, model__blocks=3))
    with start(config.parallel, config.training) as runtime:
        (chunk,) = build_model(config, runtime)
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=20_000
        )
        model = DistributedDataParallel(chunk.config, ddp_config, chunk)
        if overlap:
            for parameter in chunk.parameters():
                return_placeholder(parameter)
        model.zero_grad_buffer()
        one, other = (made_up_batches(config, runtime, step)[0] for step in range(2))

        def backward(batch: Any) -> None:
            model(batch.tokens, batch.position_ids, None, labels=batch.labels).mean().backward()

        with model.no_sync():
            backward(one)
        backward(other)
        model.finish_grad_sync()
        return {
            name: (parameter.main_grad.clone(), parameter.grad is None)
            for name, parameter in chunk.named_parameters()
        }


@pytest.mark.parametrize("tied", [False, True])
def test_overlapped_reductions_see_every_weight(tied: bool) -> None:
    """Megatron-core asserts that each weight of a bucket has a gradient, and counts them."""
    expected = run_ranks(2, reduced_gradients, False, tied)[0]
    found = run_ranks(2, reduced_gradients, True, tied)[0]
    for name, (gradient, none_left) in expected.items():
        assert torch.equal(found[name][0], gradient), name
        assert gradient.any(), name
        assert none_left
        assert found[name][1], name
