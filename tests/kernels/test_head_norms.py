"""Norms of heads within linear_qkv's output, against the norm's definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keel_megatron.kernels import reference
from keel_megatron.kernels.head_norms import Weights, head_norms

EPS, GROUPS, SHARED, D = 1e-5, 3, 2, 8


def drawn(value: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Weights]:
    """Input [s, b, groups x (shared + 2) x d], and the weights, in fp32 or fp64."""
    generator = torch.Generator().manual_seed(int(value))
    mixed = torch.randn(5, 2, GROUPS * (SHARED + 2) * D, generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    query, key, last = (torch.rand(D, generator=generator).to(wide) + 0.5 for _ in range(3))
    for leaf in (mixed, query, key, last):
        leaf.requires_grad_()
    return mixed, (query, key, last if value else None)


def plainly(mixed: Tensor, weights: Weights) -> Tensor:
    """One head after the other."""
    wide = weights[0].dtype
    parts = mixed.view(5, 2, GROUPS, SHARED + 2, D)
    of = [weights[0]] * SHARED + [weights[1], weights[2]]
    heads = [
        parts[..., head, :]
        if weight is None
        else reference.rms_norm(parts[..., head, :].to(wide), weight, EPS, mixed.dtype)
        for head, weight in enumerate(of)
    ]
    return torch.stack(heads, dim=3).view(mixed.shape)


@pytest.mark.parametrize("value", [False, True])
def test_gradients_are_those_of_finite_differences(value: bool) -> None:
    mixed, weights = drawn(value)
    leaves = [mixed, *(one for one in weights if one is not None)]

    def normed(x: Tensor, query: Tensor, key: Tensor, last: Tensor | None = None) -> Tensor:
        return head_norms(x, (query, key, last), GROUPS, EPS)

    assert torch.autograd.gradcheck(normed, leaves)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_heads_are_normalised_where_they_are(dtype: torch.dtype, value: bool) -> None:
    mixed, weights = drawn(value, dtype)
    leaves = [mixed, *(one for one in weights if one is not None)]
    down = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    found, expected = (
        [y.detach(), *torch.autograd.grad(y, leaves, down)]
        for y in (head_norms(mixed, weights, GROUPS, EPS), plainly(mixed, weights))
    )
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)
    values = [one.view(5, 2, GROUPS, -1, D)[..., -1, :] for one in (found[0], mixed.detach())]
    assert torch.equal(*values) is not value
