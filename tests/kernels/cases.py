"""Inputs of the fused operation, and how far two ways of computing it lie apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keel_megatron.kernels import reference, scaled_add_norm

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Unlaunched:
    """In the place of a kernel: writes nothing."""

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        return lambda *_arguments, **_constants: None


@dataclass(frozen=True)
class Case:
    """One call's shape and types."""

    rows: int
    hidden_size: int
    alpha: float = 16.0
    f_dtype: torch.dtype = torch.float32
    z_dtype: torch.dtype = torch.float32
    outer: bool = True
    inner: bool = True
    gain_dtype: torch.dtype = torch.float32
    scale: float = 1.0
    """Of x and f; at 1e-3 the norms' epsilon is larger than the mean square it is added to."""
    device: str = DEVICE


def inputs(case: Case) -> tuple[list[Tensor | None], list[Tensor]]:
    """x, f, outer gain and inner gain, and the gradients of x' and z."""
    generator = torch.Generator().manual_seed(case.rows * 100_003 + case.hidden_size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    h = case.hidden_size
    x = case.scale * normal(case.rows, 1, h)
    f = (case.scale * normal(case.rows, 1, h)).to(case.f_dtype)
    outer = (1 + 0.3 * normal(h)).to(case.gain_dtype) if case.outer else None
    inner = (1 + 0.3 * normal(h)).to(case.gain_dtype) if case.inner else None
    gradients = [normal(case.rows, 1, h), normal(case.rows, 1, h).to(case.z_dtype)]
    moved = [None if t is None else t.to(case.device) for t in (x, f, outer, inner)]
    return moved, [gradient.to(case.device) for gradient in gradients]


def run(case: Case, backend: Literal["exact", "auto", "torch", "triton"]) -> list[Tensor]:
    """Results and gradients; `exact` is the definition in fp64 from the same inputs."""
    tensors, gradients = inputs(case)
    z_dtype = case.z_dtype
    if backend == "exact":
        tensors = [None if t is None else t.double() for t in tensors]
        gradients, z_dtype = [gradient.double() for gradient in gradients], torch.float64
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    x, f, outer, inner = leaves
    if backend == "exact":
        out = reference.scaled_add_norm(x, f, case.alpha, outer, inner, EPS, z_dtype)
    else:
        out = scaled_add_norm(x, f, case.alpha, outer, inner, EPS, z_dtype, backend)
    outputs = [tensor for tensor in out if tensor is not None]
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(outputs, wanted, gradients[: len(outputs)])
    return [*(output.detach() for output in outputs), *found]


def error(found: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest exact value."""
    if exact.numel() == 0:
        return 0.0
    scale = exact.abs().max().clamp_min(1e-30)
    return ((found.double() - exact.double()).abs().max() / scale).item()


def tolerance(result: Tensor) -> float:
    """fp32 results: a few roundings of 2^-24 = 6e-8 and those of sums over a row or over rows.

    bf16 ones are rounded once: a device and torch round to the nearest, half a unit of the last
    place (2^-8 of the value); Triton's interpreter cuts off, up to a whole one.
    """
    if result.dtype == torch.bfloat16:
        return 1.01 * 2.0 ** (-8 if result.is_cuda else -7)
    return 1e-6


def disagreement(found: list[Tensor], exact: list[Tensor]) -> dict[int, float]:
    """Results by number that are further from the exact ones than the tolerance."""
    assert [result.shape for result in found] == [true.shape for true in exact]
    errors = [error(result, true) for result, true in zip(found, exact, strict=True)]
    return {n: e for n, e in enumerate(errors) if not e <= tolerance(found[n])}
