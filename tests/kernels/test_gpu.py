"""The fused kernels on a CUDA device against the definition in fp64 on the same device."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from keel_megatron.data.batches import Batch
from keel_megatron.kernels import scaled_add_norm
from keel_megatron.kernels.cross_entropy import linear_cross_entropy
from keel_megatron.kernels.selection import Backend
from keel_megatron.model.attention import causal_attention
from keel_megatron.model.documents import Documents, Packed
from tests.kernels.cases import EPS, Case, disagreement, error, inputs, run
from tests.kernels.test_triton_cross_entropy import agree as agree_on_logits
from tests.kernels.test_triton_rotary import Split
from tests.kernels.test_triton_rotary import run as run_split

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


@pytest.mark.parametrize("norms", ["", "qk", "qkv"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("head_dim", "shared"), [(64, 2), (80, 3), (128, 4)])
def test_the_rotary_kernels_agree(head_dim: int, shared: int, swapped: bool, norms: str) -> None:
    case = Split(512, 2, 4, shared, head_dim, torch.bfloat16, swapped, norms)
    found = run_split(case, "triton")
    assert not disagreement(found, run_split(case, "exact"))
    assert all(torch.equal(a, b) for a, b in zip(found, run_split(case, "auto"), strict=True))


@pytest.mark.parametrize("v", [1000, 50257, 131072])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_loss_kernels_agree(v: int, scale: float) -> None:
    agree_on_logits(64, v, torch.bfloat16, scale)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rows", [512, 128, 100])
def test_the_heads_gradient_joins_the_fp32_sum(rows: int, backend: Backend) -> None:
    """bf16 products straight into fp32, as no CPU does; small logits keep bf16's errors small."""
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(0.01 * torch.randn(1000, 256, device="cuda").bfloat16())
    weight.main_grad = torch.zeros(1000, 256, device="cuda")
    labels = torch.randint(0, 1000, (512,), device="cuda")
    losses = linear_cross_entropy(x, weight, labels, rows=rows, accumulate=True, backend=backend)
    losses.sum().backward()
    leaves = [one.detach().double().requires_grad_() for one in (x, weight)]
    exact = functional.cross_entropy(leaves[0] @ leaves[1].t(), labels, reduction="none")
    dx, dw = torch.autograd.grad(exact.sum(), leaves)
    assert error(losses, exact) < 1e-2
    assert error(x.grad, dx) < 1e-2
    assert error(weight.main_grad, dw) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_within_documents_agrees(dtype: torch.dtype) -> None:
    """Over borders in bf16 and with a mask in fp32, against the mask in fp64."""
    torch.manual_seed(5)
    s, b = 300, 2
    batch = Batch(documents=(torch.rand(b, s) < 1 / 40).cumsum(1).int()).to(torch.device("cuda"))
    assert batch.documents is not None
    documents = Documents(batch.documents, batch.borders, batch.longest)
    given = [torch.randn(s, b, heads, 64, device="cuda", dtype=dtype) for heads in (4, 2, 2)]
    d_out = torch.randn(s, b, 4 * 64, device="cuda", dtype=dtype)

    def passes(wide: torch.dtype) -> list[torch.Tensor]:
        operands = [one.to(wide).requires_grad_() for one in given]
        within = documents.within(operands[0], 64)
        assert isinstance(within, Packed) == (wide == torch.bfloat16)
        out = causal_attention(*operands, within=within)
        return [out, *torch.autograd.grad(out, operands, d_out.to(wide))]

    bound = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for found, exact in zip(passes(dtype), passes(torch.float64), strict=True):
        assert (found.double() - exact).norm() <= bound * exact.norm()
