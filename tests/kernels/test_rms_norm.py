"""The norm that follows no sum, against its definition."""

from __future__ import annotations

import pytest
import torch

from keel_megatron.kernels import reference, rms_norm

EPS = 1e-5


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_gradients_are_those_of_finite_differences(scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 6, dtype=torch.float64).mul_(scale).requires_grad_()
    gain = (torch.rand(6, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *leaves: rms_norm(*leaves, EPS, torch.float64), (x, gain), eps=1e-6 * scale
    )


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_it_agrees_with_the_definition(out_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 64).transpose(0, 1).requires_grad_()  # not contiguous, as attention's
    gain = (torch.rand(64) + 0.5).requires_grad_()
    gradient = torch.randn(3, 7, 64).to(out_dtype)
    found, expected = (
        [y, *torch.autograd.grad(y, [x, gain], gradient)]
        for y in (rms_norm(x, gain, EPS, out_dtype), reference.rms_norm(x, gain, EPS, out_dtype))
    )
    bound = 1e-5 if out_dtype == torch.float32 else 1e-2
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)
