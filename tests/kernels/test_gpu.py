"""The fused kernels on a CUDA device against the definition in fp64 on the same device."""

from __future__ import annotations

import pytest
import torch

from keel_megatron.kernels import scaled_add_norm
from tests.kernels.cases import EPS, Case, disagreement, error, inputs, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "hidden_size", [64, 65, 128, 257, 512, 1000, 1024, 2048, 3072, 5120, 8192, 16384]
)
@pytest.mark.parametrize("rows", [1, 7, 4096])
@pytest.mark.parametrize("f_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("outer", "inner"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_the_device_agrees(
    hidden_size: int, rows: int, f_dtype: torch.dtype, outer: bool, inner: bool
) -> None:
    case = Case(rows, hidden_size, 128.0, f_dtype, torch.bfloat16, outer, inner)
    assert not disagreement(run(case, "triton"), run(case, "exact"))


@pytest.mark.parametrize("hidden_size", [64, 1024, 4096, 16384])
def test_it_is_chosen_on_the_device_and_repeats_its_bits(hidden_size: int) -> None:
    case = Case(2048, hidden_size, 512.0, torch.bfloat16, torch.bfloat16)
    first = run(case, "triton")
    for other in (run(case, "triton"), run(case, "auto")):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_fp64_goes_another_way() -> None:
    """The kernel is fp32's: on the device, too, fp64 is exact."""
    case = Case(64, 256)
    (x, f, outer, inner), _ = inputs(case)
    doubles = [tensor.double() for tensor in (x, f, outer, inner)]
    found = scaled_add_norm(doubles[0], doubles[1], 16.0, *doubles[2:], EPS, torch.float64)
    exact = run(case, "exact")[:2]
    assert all(error(one, other) < 1e-13 for one, other in zip(found, exact, strict=True))
