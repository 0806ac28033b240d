"""Which operations run as Triton kernels: the selected ones, on CUDA, where Triton is installed."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Literal

from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
"""Implementation of an operation. auto: Triton where `use_triton` says so, otherwise torch."""

_selected: frozenset[str] | None = None


def select(names: Collection[str]) -> None:
    """Select the operations that run as Triton kernels on CUDA, in this process; default: all.

    Args:
        names: those of the setting `kernels.triton`.
    """
    global _selected
    _selected = frozenset(names)


def use_triton(name: str, x: Tensor, backend: str, *, fits: bool) -> bool:
    """Whether an operation runs as a Triton kernel.

    Args:
        name: the operation, as in the setting `kernels.triton`.
        x: its input.
        backend: `triton`: yes; `auto`: if x is on CUDA, fits, and the operation is selected.
        fits: whether the kernel supports the input.
    """
    if backend == "triton":
        return True
    selected = _selected is None or name in _selected
    return backend == "auto" and x.is_cuda and fits and selected and triton_is_installed()


@cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
