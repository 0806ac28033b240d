"""Every stand-in beside what it stands for, on a CPU: results, and what is kept for going back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from keel_megatron.kernels import fused, triton_norm
from keel_megatron.planner.trace import stand_ins
from tests.memory import Watch

Facts = tuple[Any, ...]


def facts(tensor: Tensor | None) -> Facts | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous())


def observed(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Results, what is kept, the gradients, and the most that lived in the backward pass."""
    given = [a.clone().requires_grad_() if _trainable(a) else a for a in arguments]
    kept: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(facts(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = function(*given)
    results = results if isinstance(results, tuple) else (results,)
    there = [result for result in results if result is not None]
    gradients = [torch.zeros_like(result) for result in there]
    with Watch() as watch:
        torch.autograd.backward(there, gradients)
    return {
        "results": [facts(result) for result in results],
        "kept": sorted(map(str, kept)),
        "gradients": [facts(a.grad) for a in given if isinstance(a, Tensor) and a.requires_grad],
        "peak": watch.peak,
    }


def _trainable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("outer", "inner"), [(True, True), (True, False), (False, True), (False, False)]
)
@pytest.mark.parametrize("h", [24, 64])
def test_the_triton_kernel(dtype: torch.dtype, outer: bool, inner: bool, h: int) -> None:
    """Without a GPU it runs 4 programs; so does the stand-in on a device of so many processors."""
    x, f = torch.randn(6, 2, h), torch.randn(6, 2, h).to(dtype)
    gains = [torch.ones(h) if wanted else None for wanted in (outer, inner)]
    launched: Counter[str] = Counter()
    function = stand_ins.scaled_add_norm_function(lambda name: launched.update([name]), 4)
    arguments = (x, f, 2.0, *gains, 1e-5, dtype)
    real = observed(triton_norm.ScaledAddNorm.apply, *arguments)
    found = observed(function.apply, *arguments)
    assert found == real
    assert launched == {"triton forward": 1, "triton backward": 1}


@pytest.mark.parametrize("h", [64, 200, 1024, 1500, 4096, 8192, 16384])
def test_the_triton_kernels_programs(h: int) -> None:
    tile = triton_norm.backward_tile(h)
    for rows in (1, 70, 100_000):
        expected = max(1, min(132 * tile.programs_per_sm, -(-rows // tile.rows)))
        assert stand_ins.resident_programs(h, rows, 132) == expected


def test_torchs_norm() -> None:
    """CUDA's kernel keeps what kernels.fused keeps; its results are those of torch's operators."""
    x, gain = torch.randn(5, 2, 16), torch.ones(16)
    function = stand_ins.rms_norm_function(lambda _name: None)
    found = observed(function.apply, x, gain)
    same = observed(lambda x, gain: fused.RmsNorm.apply(x, gain, 1e-5, torch.float32), x, gain)
    torchs = observed(lambda x, gain: torch.rms_norm(x, (16,), gain, 1e-5), x, gain)
    assert (found["results"], found["gradients"]) == (torchs["results"], torchs["gradients"])
    assert found["kept"] == same["kept"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swiglu(dtype: torch.dtype) -> None:
    """Megatron-core's two functions, before torch compiles them."""
    from megatron.core.fusions import fused_bias_swiglu

    y = torch.randn(3, 2, 12).to(dtype)
    forward, backward = stand_ins.swiglu(lambda _name: None)
    out, d_out = forward(y), torch.zeros(3, 2, 6, dtype=dtype)
    plain = [
        getattr(function, "__wrapped__", function)
        for function in (fused_bias_swiglu.swiglu, fused_bias_swiglu.swiglu_back)
    ]
    gate, up = y.chunk(2, -1)
    assert facts(out) == facts(nn.functional.silu(gate) * up)
    assert facts(out) == facts(plain[0](y))
    assert facts(backward(d_out, y)) == facts(plain[1](d_out, y))


def test_dropout_keeps_a_byte_an_element() -> None:
    x, call = torch.randn(4, 8), stand_ins.dropout(lambda _name: None)
    found = observed(lambda x: call(x, 0.5), x)
    real = observed(lambda x: torch.native_dropout(x, 0.5, True)[0], x)
    assert {**found, "peak": 0} == {**real, "peak": 0}
    assert found["kept"] == [str(((4, 8), torch.bool, True))]
    assert call(x, 0.5, training=False) is x
    assert call(x, 0.0) is x


@pytest.mark.parametrize(
    ("which", "dtype"),
    [("cudnn", torch.bfloat16), ("flash", torch.bfloat16), ("flash", torch.float32)],
)
def test_attention_is_shaped_as_torchs(which: str, dtype: torch.dtype) -> None:
    """The operator's result and gradients, on meta tensors, beside torch's function on a CPU."""
    shapes = ((2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8))
    call = stand_ins.attention(which).scaled_dot_product_attention
    plain = nn.functional.scaled_dot_product_attention

    def attend(function: Any) -> Callable[..., Tensor]:
        return lambda *qkv: function(*qkv, is_causal=True, enable_gqa=True)

    real = observed(attend(plain), *(torch.randn(shape).to(dtype) for shape in shapes))
    meta = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    found = observed(attend(call), *meta)
    assert [one[:2] for one in found["results"]] == [one[:2] for one in real["results"]]
    assert [one[:2] for one in found["gradients"]] == [one[:2] for one in real["gradients"]]
