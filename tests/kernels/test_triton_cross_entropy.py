"""The Triton kernels of softmax and loss against torch's operators in fp64.

In Triton's interpreter where no GPU is.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from keel_megatron.kernels import triton_cross_entropy
from keel_megatron.kernels.cross_entropy import linear_cross_entropy
from tests.distributed import run_ranks
from tests.kernels.cases import DEVICE, Unlaunched, error, tolerance
from tests.kernels.cross_entropy_ranks import Z_LOSS, H, N, V, drawn, split_results_in_triton
from tests.memory import Watch

BLOCK = triton_cross_entropy.BLOCK
NARROW = (1, 2, 54, 100, 1000)
AROUND_A_BLOCK = (BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17)


def logits_of(rows: int, v: int, dtype: torch.dtype, scale: float) -> tuple[Tensor, ...]:
    """Logits [n, v], labels [n, 1] and the losses' gradients [n, 1], every fifth 0."""
    generator = torch.Generator().manual_seed(rows * 1009 + v)
    logits = (scale * torch.randn(rows, v, generator=generator)).to(DEVICE, dtype)
    labels = torch.randint(0, v, (rows, 1), generator=generator).to(DEVICE)
    d = torch.rand(rows, 1, generator=generator).to(DEVICE)
    d[::5] = 0.0  # masked tokens
    return logits, labels, d


def agree(rows: int, v: int, dtype: torch.dtype, scale: float) -> None:
    logits, labels, d = logits_of(rows, v, dtype, scale)
    exact = logits.double().requires_grad_()
    losses = functional.cross_entropy(exact, labels.squeeze(1), reduction="none")
    (expected,) = torch.autograd.grad(losses, exact, d.squeeze(1).double())
    log_sums, scores = triton_cross_entropy.row_sums(logits, labels)
    assert error(log_sums, exact.detach().logsumexp(1, keepdim=True)) < 1e-6
    assert torch.equal(scores, logits.gather(1, labels).float())
    found = triton_cross_entropy.to_gradient(logits, labels, log_sums, d, -d)
    assert found.data_ptr() == logits.data_ptr()
    assert found.dtype == dtype
    # The softmax's error is that of log-sum-exp, whose own is relative; beside a softmax near 1 the
    # gradient may be much smaller than that.
    rounding = (2.0**-22 + 2e-7 * float(log_sums.abs().max())) * float(d.max())
    apart = float((found.double() - expected).abs().max())
    assert apart <= tolerance(found) * float(expected.abs().max()) + rounding
    assert not found[::5].any()


any_logits = given(
    rows=st.integers(1, 12),
    v=st.sampled_from(NARROW + AROUND_A_BLOCK),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
)


@settings(max_examples=20, deadline=None)
@any_logits
def test_any_shape_agrees(rows: int, v: int, dtype: torch.dtype, scale: float) -> None:
    agree(rows, v, dtype, scale)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@any_logits
def test_many_shapes_agree(rows: int, v: int, dtype: torch.dtype, scale: float) -> None:
    agree(rows, v, dtype, scale)


def test_no_rows_are_no_work() -> None:
    logits, labels, d = logits_of(0, 54, torch.float32, 1.0)
    log_sums, _scores = triton_cross_entropy.row_sums(logits, labels)
    assert triton_cross_entropy.to_gradient(logits, labels, log_sums, d, d).shape == (0, 54)


def test_places_of_any_strides() -> None:
    logits, labels, _d = logits_of(6, 54, torch.float32, 1.0)
    spread = torch.stack((labels, labels + 1), -1)[..., 0]
    own = triton_cross_entropy.row_sums(logits, labels)
    found = triton_cross_entropy.row_sums(logits, spread)
    assert all(torch.equal(one, other) for one, other in zip(own, found, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("v", [100, BLOCK + 100])
def test_minus_infinity_is_probability_zero_and_nan_stays_nan(v: int) -> None:
    """A first block of nothing but -inf; what diverged must show in the loss."""
    logits, labels, _d = logits_of(4, v, torch.float32, 1.0)
    logits[0, : v - 100 + 50] = float("-inf")
    logits[1, -1] = float("nan")
    logits[2, 0] = float("nan")
    logits[3, 0] = float("inf")
    log_sums, _scores = triton_cross_entropy.row_sums(logits, labels)
    expected = torch.logsumexp(logits.double(), 1, keepdim=True)
    assert error(log_sums[:1], expected[:1]) < 1e-6
    assert log_sums[1:].isnan().all()


@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
@pytest.mark.parametrize("rows", [N, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradients_are_those_of_torchs_operators(
    dtype: torch.dtype, rows: int, z_loss: float
) -> None:
    """Both round the logits to bf16 on a CPU, so only the roundings after it differ."""
    x, weight, labels, gradients = (one.to(DEVICE) for one in drawn(dtype))
    found = []
    for backend in ("triton", "torch"):
        leaves = [one.clone().requires_grad_() for one in (x, weight)]
        losses = linear_cross_entropy(
            *leaves,
            labels,
            rows=rows,
            z_loss=z_loss,
            backend=backend,  # type: ignore[arg-type]
        )
        found.append([losses.detach(), *torch.autograd.grad(losses, leaves, gradients)])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert error(one, other) < (1e-6 if one.dtype == torch.float32 else 2**-6)
    assert not found[0][1][gradients == 0].any()


@pytest.mark.parametrize("rows", [N, 10])
def test_the_weights_gradient_joins_the_sum(rows: int) -> None:
    x, weight, labels, gradients = drawn(torch.float32)
    found = []
    for backend in ("triton", "torch"):
        parameter = torch.nn.Parameter(weight)
        parameter.main_grad = torch.zeros(V, H)
        losses = linear_cross_entropy(
            x,
            parameter,
            labels,
            rows=rows,
            accumulate=True,
            backend=backend,  # type: ignore[arg-type]
        )
        losses.backward(gradients)
        assert parameter.grad is None
        found.append(parameter.main_grad)
    torch.testing.assert_close(*found)


def test_whole_rows_refuse_a_second_backward_pass() -> None:
    """Its logits have become the gradient: no wrong result but torch's error."""
    x, weight, labels, _gradients = drawn(torch.float32)
    loss = linear_cross_entropy(x.requires_grad_(), weight, labels, rows=N, backend="triton").sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rows", [64, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_exist_once_in_the_products_type(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the kernels: the interpreter holds its arguments for a while."""
    monkeypatch.setattr(triton_cross_entropy, "_row_sums", Unlaunched())
    monkeypatch.setattr(triton_cross_entropy, "_gradient", Unlaunched())
    n, v = 64, 4096
    x = torch.randn(n, H, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(v, H, dtype=dtype))
    weight.main_grad = torch.zeros(v, H)
    labels = torch.arange(n)
    piece = dtype.itemsize * rows * v
    with Watch() as watch:
        losses = linear_cross_entropy(
            x, weight, labels, rows=rows, accumulate=True, backend="triton"
        )
        kept = watch.live
        losses.sum().backward()
    assert kept == 4 * n + 4 * n + (piece if rows == n else 0)  # losses, and log-sum-exps
    # A CPU has a bf16 product of its own for the weight's gradient.
    product = weight.nbytes if dtype == torch.bfloat16 else 0
    assert 0 <= watch.peak - piece - product < x.nbytes + 64 * n


def test_a_vocabulary_over_two_ranks_is_one_vocabulary() -> None:
    """Logits up to 400, so the ranks' shares of a row are all or nothing; with sequence split."""
    x, weight, labels, gradients = drawn(torch.float32, scale=30.0)
    leaves = [one.double().requires_grad_() for one in (x, weight)]
    logits = leaves[0] @ leaves[1].t()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    every = {}
    for z_loss in (0.0, Z_LOSS):
        trained = losses + z_loss * logits.logsumexp(1) ** 2
        given = {"grad_outputs": gradients.double(), "retain_graph": True}
        every[z_loss] = [losses.detach(), *torch.autograd.grad(trained, leaves, **given)]
    ranks = run_ranks(2, split_results_in_triton)
    assert len(ranks[0]) == 8
    for case, (found, dx, _dw) in ranks[0].items():
        others, exact = ranks[1][case], every[case[2]]
        assert torch.equal(found, others[0]), case
        whole = torch.cat([dx, others[1]]) if case[0] else dx
        for one, other in zip((found, whole), exact, strict=False):
            assert error(one, other) < 2e-5, case
        assert error(torch.cat([rank[case][2] for rank in ranks]), exact[2]) < 2e-5, case
