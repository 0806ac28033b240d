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


def test_triton_kernels_are_counted_and_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import KernelInterface

    launched: Counter[str] = Counter()
    launch = stand_ins.triton_launch(lambda name: launched.update([name]))
    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    x, weight = torch.randn(6, 2, 64), torch.ones(64)
    real = triton_norm.ScaledAddNorm.apply
    found = observed(real, x, x.bfloat16(), 2.0, weight, weight, 1e-5, torch.bfloat16)
    assert found["results"][1] == ((6, 2, 64), torch.bfloat16, True)
    assert launched == {"triton_norm_forward": 1, "triton_norm_backward": 1}


def test_torchs_norm() -> None:
    """CUDA's kernel keeps what kernels.fused keeps; its results are those of torch's operators."""
    x, gain = torch.randn(5, 2, 16), torch.ones(16)
    function = stand_ins.rms_norm_function(lambda _name: None)
    found = observed(function.apply, x, gain)
    same = observed(lambda x, gain: fused.RmsNorm.apply(x, gain, 1e-5, torch.float32), x, gain)
    torchs = observed(lambda x, gain: torch.rms_norm(x, (16,), gain, 1e-5), x, gain)
    assert (found["results"], found["gradients"]) == (torchs["results"], torchs["gradients"])
    assert found["kept"] == same["kept"]


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
