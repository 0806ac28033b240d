"""The definition and its hand-written form: against numpy, finite differences and each other."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from keel_megatron.kernels import bytes_per_token, reference, scaled_add_norm
from tests.kernels.cases import EPS, Case, disagreement, run

DEFINITION = partial(scaled_add_norm, backend="reference")
HAND_WRITTEN = partial(scaled_add_norm, backend="torch")
BOTH_WAYS = pytest.mark.parametrize(
    "operation", [DEFINITION, HAND_WRITTEN], ids=["definition", "hand-written"]
)
NORMS = pytest.mark.parametrize(
    ("outer", "inner"), [(True, True), (True, False), (False, True), (False, False)]
)


def numpy_norm(u: np.ndarray, gain: np.ndarray) -> np.ndarray:
    out = np.empty_like(u)
    for index in np.ndindex(u.shape[:-1]):
        row = u[index]
        out[index] = row / np.sqrt(np.dot(row, row) / len(row) + EPS) * gain
    return out


@BOTH_WAYS
@NORMS
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_it_is_the_formula(operation, outer: bool, inner: bool, scale: float) -> None:
    generator = np.random.default_rng(0)
    x, f = scale * generator.normal(size=(2, 5, 3, 24))
    g_out, g_in = generator.normal(size=(2, 24))
    u = 7.0 * x + f
    expected = numpy_norm(u, g_out) if outer else u
    x_new, z = operation(
        torch.tensor(x),
        torch.tensor(f),
        7.0,
        torch.tensor(g_out) if outer else None,
        torch.tensor(g_in) if inner else None,
        EPS,
        torch.float64,
    )
    np.testing.assert_allclose(x_new.numpy(), expected, rtol=1e-13, atol=1e-13)
    if inner:
        np.testing.assert_allclose(z.numpy(), numpy_norm(expected, g_in), rtol=1e-12, atol=1e-13)
    else:
        assert z is None


@BOTH_WAYS
@NORMS
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_gradients_are_those_of_finite_differences(
    operation, outer: bool, inner: bool, scale: float
) -> None:
    torch.manual_seed(0)
    leaves = list(torch.randn(2, 3, 2, 6, dtype=torch.float64).mul_(scale).unbind(0))
    leaves += [torch.rand(6, dtype=torch.float64) + 0.5 for _ in range(outer + inner)]
    for leaf in leaves:
        leaf.requires_grad_()

    def function(x: torch.Tensor, f: torch.Tensor, *gains: torch.Tensor) -> tuple:
        g_out = gains[0] if outer else None
        g_in = gains[-1] if inner else None
        out = operation(x, f, 3.0, g_out, g_in, EPS, torch.float64)
        return tuple(tensor for tensor in out if tensor is not None)

    # Where epsilon rules, second derivatives are about 1/scale times larger: a finer step.
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6 * scale)


@NORMS
@pytest.mark.parametrize("f_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "hidden_size"), [(1, 65), (37, 64), (64, 1000)])
def test_the_hand_written_form_agrees(
    rows: int,
    hidden_size: int,
    f_dtype: torch.dtype,
    gain_dtype: torch.dtype,
    outer: bool,
    inner: bool,
) -> None:
    case = Case(rows, hidden_size, 128.0, f_dtype, f_dtype, outer, inner, gain_dtype)
    found = run(case, "torch")
    assert not disagreement(found, run(case, "exact"))
    types = [torch.float32, *([f_dtype] if inner else []), torch.float32, f_dtype]
    assert [result.dtype for result in found] == types + [gain_dtype] * (outer + inner)


@pytest.mark.parametrize("unused", [0, 1])
def test_one_result_may_be_unused(unused: int) -> None:
    x, f = torch.randn(2, 5, 16, dtype=torch.float64).unbind(0)
    leaves = [x, f, *torch.rand(2, 16, dtype=torch.float64).unbind(0)]
    for leaf in leaves:
        leaf.requires_grad_()
    found, expected = (
        torch.autograd.grad(
            operation(x, f, 2.0, *leaves[2:], EPS, torch.float64)[1 - unused].square().sum(),
            leaves,
            materialize_grads=True,
        )
        for operation in (HAND_WRITTEN, reference.scaled_add_norm)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_cpu_takes_the_hand_written_form() -> None:
    """Bit for bit, so that a run's losses do not depend on what else is there."""
    case = Case(64, 96, device="cpu")
    for one, other in zip(run(case, "auto"), run(case, "torch"), strict=True):
        assert torch.equal(one, other)


def test_shapes_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match="shapes must be equal"):
        scaled_add_norm(torch.ones(4, 8), torch.ones(8), 1.0, None, None, EPS, torch.float32)


def test_a_second_derivative_is_refused() -> None:
    x, f, gain = torch.ones(4, 8, requires_grad=True), torch.ones(4, 8), torch.ones(8)
    x_new, _ = HAND_WRITTEN(x, f, 2.0, gain, None, EPS, torch.float32)
    (dx,) = torch.autograd.grad(x_new.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_bytes_are_counted_once_each() -> None:
    """x and f in, x' and z out: 4 + 2 + 4 + 2 bytes an element; 4 + 2 + 4 + 2 + 4 + 2 back."""
    assert bytes_per_token(1024, torch.bfloat16, torch.bfloat16) == (12 * 1024, 18 * 1024)
    assert bytes_per_token(64, torch.float32, None) == (12 * 64, 20 * 64)
