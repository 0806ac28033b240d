"""The output layer and its loss in pieces, against torch's own operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from keel_megatron.kernels.cross_entropy import linear_cross_entropy
from tests.distributed import run_ranks
from tests.kernels.cross_entropy_ranks import ROWS, Z_LOSS, H, N, V, drawn, split_results
from tests.memory import Watch

# A few roundings in fp64 and fp32; bf16 rounds logits of up to 15 by up to 2^-5, and p as much.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-5}


def plain(
    x: Tensor, weight: Tensor, labels: Tensor, gradients: Tensor, z_loss: float = 0.0
) -> list[Tensor]:
    """Losses, and dx and dW with the z-loss, in fp64 by torch's differentiation."""
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight)]
    logits = leaves[0] @ leaves[1].t()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    trained = losses + z_loss * logits.logsumexp(1) ** 2
    return [losses.detach(), *torch.autograd.grad(trained, leaves, gradients.double())]


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest exact value."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("z_loss", [0.0, Z_LOSS])
@pytest.mark.parametrize("rows", [*ROWS, 1])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_losses_and_gradients_are_torchs(dtype: torch.dtype, rows: int, z_loss: float) -> None:
    x, weight, labels, gradients = drawn(dtype)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    losses = linear_cross_entropy(*leaves, labels, rows=rows, z_loss=z_loss)
    found = [losses.detach(), *torch.autograd.grad(losses, leaves, gradients)]
    wide = torch.promote_types(dtype, torch.float32)
    assert [one.dtype for one in found] == [wide, dtype, dtype]
    exact = plain(x.detach(), weight.detach(), labels, gradients, z_loss)
    for one, other in zip(found, exact, strict=True):
        assert error(one, other) < BOUNDS[dtype]
    masked = gradients == 0
    assert masked.any()
    assert not found[1][masked].any()  # and so nothing of a masked token arrives


def test_gradients_are_the_losses_differences() -> None:
    """A second witness, by finite differences; pieces alone may be gone back through repeatedly."""
    x, weight, labels, _gradients = drawn(torch.float64)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda a, b: linear_cross_entropy(a, b, labels, rows=10), leaves, fast_mode=True
    )


def test_whole_rows_refuse_a_second_backward_pass() -> None:
    """Its log-softmax has become the gradient: no wrong result but torch's error."""
    x, weight, labels, _gradients = drawn(torch.float32)
    loss = linear_cross_entropy(x.requires_grad_(), weight, labels, rows=N).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_extreme_logits_neither_overflow_nor_vanish() -> None:
    x, weight, labels, gradients = drawn(torch.float32, scale=1e4)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    losses = linear_cross_entropy(*leaves, labels, rows=10)
    found = [losses.detach(), *torch.autograd.grad(losses, leaves, gradients)]
    exact = plain(x.detach(), weight.detach(), labels, gradients)
    assert exact[0].max() > 1e5
    assert all(error(one, other) < 1e-3 for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize("rows", [N, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_joins_the_sum_of_the_micro_batches(
    dtype: torch.dtype, rows: int
) -> None:
    x, weight, labels, gradients = drawn(dtype)
    parameter = torch.nn.Parameter(weight)
    parameter.main_grad = torch.zeros(V, H)
    exact = torch.zeros(V, H, dtype=torch.float64)
    for micro_batch in (x, x.flip(0)):
        leaf = micro_batch.clone().requires_grad_()
        losses = linear_cross_entropy(leaf, parameter, labels, rows=rows, accumulate=True)
        losses.backward(gradients)
        _losses, dx, dw = plain(micro_batch, weight, labels, gradients)
        assert error(leaf.grad, dx) < BOUNDS[dtype]
        exact += dw
    assert parameter.grad is None
    assert parameter.grad_added_to_main_grad
    assert error(parameter.main_grad, exact) < BOUNDS[dtype]


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight, labels, gradients = drawn(torch.float64)
    _losses, dx, dw = plain(x, weight, labels, gradients)
    for leaf, exact in ((x, dx), (weight, dw)):
        leaf.requires_grad_()
        losses = linear_cross_entropy(x, weight, labels, rows=10)
        (found,) = torch.autograd.grad(losses, leaf, gradients)
        assert error(found, exact) < BOUNDS[torch.float64]
        leaf.requires_grad_(False)


@pytest.mark.parametrize("rows", [256, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_piece_of_the_logits_exists(dtype: torch.dtype, rows: int) -> None:
    """Every tensor that an operator makes is seen; of 256 rows 32 are a piece, or all."""
    n, v = 256, 8192
    x = torch.randn(n, H, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(v, H, dtype=dtype))
    weight.main_grad = torch.zeros(v, H)
    labels = torch.arange(n)
    with Watch() as watch:
        losses = linear_cross_entropy(x, weight, labels, rows=rows, accumulate=True)
        kept = watch.live
        losses.sum().backward()
    assert watch.largest == 4 * rows * v
    pieces = rows < n
    assert kept == 4 * n + (0 if pieces else 4 * n * v)
    # The logits of a piece and their softmax; x's gradient, and what is one number a row.
    assert 0 <= watch.peak - 2 * 4 * rows * v < x.nbytes + 64 * n
    assert weight.main_grad.any()


def test_a_vocabulary_over_two_ranks_is_one_vocabulary() -> None:
    """Logits up to 400, so the ranks' shares of a row are all or nothing; with sequence split."""
    drawings = drawn(torch.float64, scale=30.0)
    every = {z_loss: plain(*drawings, z_loss) for z_loss in (0.0, Z_LOSS)}
    ranks = run_ranks(2, split_results)
    assert every[0.0][0].max() > 100
    assert error(every[Z_LOSS][1], every[0.0][1]) > 0.1
    for case, (losses, dx, _dw) in ranks[0].items():
        others, exact = ranks[1][case], every[case[2]]
        assert torch.equal(losses, others[0]), case
        whole = torch.cat([dx, others[1]]) if case[0] else dx
        for one, other in zip((losses, whole), exact, strict=False):
            assert error(one, other) < 1e-12, case
        assert error(torch.cat([rank[case][2] for rank in ranks]), exact[2]) < 1e-12, case
