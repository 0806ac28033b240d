"""The Triton kernels of the rotary embedding against the plain operators in fp64.

In Triton's interpreter where no GPU is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keel_megatron.kernels import reference
from keel_megatron.model.rotary import RotaryTable, apply_rotary, split_rotary
from tests.kernels.cases import DEVICE, disagreement

EPS = 1e-5


@dataclass(frozen=True)
class Split:
    """One call's shape and type."""

    s: int
    b: int = 1
    groups: int = 2
    shared: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    swapped: bool = False
    """Whether attention's gradients are [b, heads, s, d] in memory."""
    norms: str = ""
    """Which of query, key and value are normalised before."""

    @property
    def width(self) -> int:
        return self.groups * (self.shared + 2) * self.head_dim


def plain(mixed: Tensor, table: Tensor, groups: int, weights: list[Tensor]) -> tuple[Tensor, ...]:
    s, b = mixed.shape[:2]
    parts = mixed.view(s, b, groups, -1, table.size(-1))
    query, key, value = (
        part if weight is None else reference.rms_norm(part, weight, EPS, part.dtype)
        for part, weight in zip_longest(parts.split([parts.size(3) - 2, 1, 1], dim=3), weights)
    )
    query = query.reshape(s, b, -1, table.size(-1))
    return apply_rotary(query, table), apply_rotary(key.squeeze(3), table), value.squeeze(3)


def drawn(case: Split) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The fused tensor, the table (a part of a longer one), and the results' gradients."""
    generator = torch.Generator().manual_seed(case.s * 1009 + case.head_dim)
    mixed = torch.randn(case.s, case.b, case.width, generator=generator).to(DEVICE, case.dtype)
    table = RotaryTable(case.head_dim, 10000.0, 2 * case.s + 1, case.dtype)(case.s).to(DEVICE)
    gradients = []
    for heads in (case.groups * case.shared, case.groups, case.groups):
        shape = (case.s, case.b, heads, case.head_dim)
        gradient = torch.randn(shape, generator=generator).to(DEVICE, case.dtype)
        if case.swapped:
            gradient = gradient.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
        gradients.append(gradient)
    return mixed, table, gradients


def run(case: Split, backend: Literal["exact", "auto", "torch", "triton"]) -> list[Tensor]:
    """Query, key, value, and the gradients of the fused tensor and of the norms' weights.

    `exact` is plain, in fp64.
    """
    mixed, table, gradients = drawn(case)
    if backend == "exact":
        mixed, table, gradients = mixed.double(), table.double(), [g.double() for g in gradients]
    wide = torch.promote_types(mixed.dtype, torch.float32)
    weights = [0.5 + torch.arange(case.head_dim, dtype=wide, device=DEVICE) / case.head_dim]
    weights = [one.clone().requires_grad_() for one in weights * len(case.norms)]
    mixed.requires_grad_()
    if backend == "exact":
        results = plain(mixed, table, case.groups, weights)
    else:
        norms: Any = (*weights, None)[:3] if weights else None
        results = split_rotary(mixed, table, case.groups, backend, norms=norms, eps=EPS)
    found = torch.autograd.grad(results, [mixed, *weights], gradients)
    return [*(result.detach() for result in results), *found]


def agree(case: Split) -> None:
    found = run(case, "triton")
    assert {one.dtype for one in found[:4]} == {case.dtype}
    assert {one.dtype for one in found[4:]} <= {torch.float32}
    assert not disagreement(found, run(case, "exact")), case


any_split = given(
    s=st.integers(1, 70),
    b=st.integers(1, 2),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 6, 16, 24, 64, 80, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    swapped=st.booleans(),
    norms=st.sampled_from(["", "qk", "qkv"]),
)


@settings(max_examples=10, deadline=None)
@any_split
def test_any_shape_agrees(**shape: object) -> None:
    agree(Split(**shape))  # type: ignore[arg-type]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@any_split
def test_many_shapes_agree(**shape: object) -> None:
    agree(Split(**shape))  # type: ignore[arg-type]


@pytest.mark.parametrize("head_dim", [256, 2048])
def test_the_widest_heads_agree(head_dim: int) -> None:
    agree(Split(2, head_dim=head_dim, dtype=torch.bfloat16))


def test_no_tokens_are_no_work() -> None:
    assert all(one.numel() == 0 for one in run(Split(0), "triton"))
    *empty, d_query, d_key = run(Split(0, norms="qk"), "triton")
    assert all(one.numel() == 0 for one in empty)
    assert not torch.cat((d_query, d_key)).any()


def test_strides_of_the_fused_tensor_do_not_matter() -> None:
    case = Split(6, 2)
    mixed, table, _gradients = drawn(case)
    turned = mixed.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    spread = torch.stack((mixed, mixed), -1)[..., 0]
    own = split_rotary(mixed, table, case.groups, "triton")
    for other in (turned, spread):
        assert not other.is_contiguous()
        found = split_rotary(other, table, case.groups, "triton")
        assert all(torch.equal(one, two) for one, two in zip(own, found, strict=True))


def test_gradients_without_adjacent_elements_are_read_too() -> None:
    """A sum's gradient is one element, expanded."""
    case = Split(6, 2)
    mixed, table, _gradients = drawn(case)
    gradients = []
    for backend in ("triton", "torch"):
        leaf = mixed.clone().requires_grad_()
        results = split_rotary(leaf, table, case.groups, backend)  # type: ignore[arg-type]
        sum(one.sum() for one in results).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_a_table_of_other_strides_is_read_too() -> None:
    case = Split(6)
    mixed, table, _gradients = drawn(case)
    spread = torch.stack((table, table), -1)[..., 0]
    own = split_rotary(mixed, table, case.groups, "triton")
    found = split_rotary(mixed, spread, case.groups, "triton")
    assert all(torch.equal(one, two) for one, two in zip(own, found, strict=True))


def test_what_it_cannot_do_is_refused() -> None:
    mixed, table, _gradients = drawn(Split(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="backend='torch'"):
        split_rotary(mixed, table, 2, "triton")
    with pytest.raises(ValueError, match=r"float32.*float64"):
        split_rotary(mixed.float(), table, 2, "triton")
