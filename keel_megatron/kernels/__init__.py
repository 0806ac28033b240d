"""The fused scaled add + RMSNorm (+ the next inner RMSNorm): one operation, chosen by device."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from keel_megatron.kernels import fused, reference
from keel_megatron.kernels.selection import triton_is_installed, use_triton

MAX_TRITON_HIDDEN_SIZE = 16384

Backend = Literal["auto", "torch", "triton", "reference"]

__all__ = [
    "Backend",
    "bytes_per_token",
    "recomputable_rms_norm",
    "rms_norm",
    "scaled_add_norm",
    "triton_is_installed",
]


def scaled_add_norm(
    x: Tensor,
    f: Tensor,
    alpha: float,
    outer_weight: Tensor | None,
    inner_weight: Tensor | None,
    eps: float,
    z_dtype: torch.dtype,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """X' = N_out(alpha x + f) and z = N_in(x'); `kernels.reference.scaled_add_norm` defines it.

    `auto`: one Triton kernel each for the forward and backward pass on CUDA (`triton_norm.py`);
    otherwise, and on CUDA for fp64, h > 16384 or where `selection.use_triton` refuses, as `torch`.
    `torch`: torch's operators with an explicit backward pass (`fused.py`). `reference`: the
    definition, by autograd.

    A token moves `bytes_per_token` bytes forward and backward: every input and every output is
    read or written once, the minimum of an operation given x and f that leaves x' and z.

    Args:
        x: see `kernels.reference.scaled_add_norm`, as for all that follow.
        f: branch output, of x's shape.
        alpha: scale of the skip path.
        outer_weight: weight of N_out, or None.
        inner_weight: weight of N_in, or None.
        eps: epsilon.
        z_dtype: type of z.
        backend: the implementation; see above.

    Raises:
        ValueError: f and x have different shapes, or `triton` does not support the input.
    """
    if f.shape != x.shape:
        raise ValueError(
            f"f has the shape {tuple(f.shape)}, x {tuple(x.shape)}: the shapes must be equal"
        )
    arguments = (x, f, alpha, outer_weight, inner_weight, eps, z_dtype)
    operation: Any
    fits = x.dtype == torch.float32 and x.size(-1) <= MAX_TRITON_HIDDEN_SIZE
    if use_triton("norm", x, backend, fits=fits):
        # Imported late: importing Triton takes a second, and a CPU run does not need it.
        from keel_megatron.kernels import triton_norm

        operation = triton_norm.ScaledAddNorm
    elif backend == "reference":
        return reference.scaled_add_norm(*arguments)
    else:
        operation = fused.ScaledAddNorm
    return operation.apply(*arguments)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """RMSNorm alone, where no sum precedes it: `kernels.reference.rms_norm` defines it.

    On CUDA it is torch's own kernel, elsewhere `fused.py`.
    """
    if x.is_cuda:
        return torch.rms_norm(x, (x.size(-1),), weight, eps).to(out_dtype)
    return recomputable_rms_norm(x, weight, eps, out_dtype)


def recomputable_rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """`rms_norm` whose result `model/recompute.py` can free on every device: `fused.py`'s."""
    operation: Any = fused.RmsNorm
    result: Tensor = operation.apply(x, weight, eps, out_dtype)
    return result


def bytes_per_token(
    hidden_size: int, f_dtype: torch.dtype, z_dtype: torch.dtype | None
) -> tuple[int, int]:
    """Bytes of device memory access per token, forward and backward.

    Forward: read x (fp32) and f, write x' (fp32) and z. Backward: read x, f and the gradients of
    x' and z, write those of x (fp32) and f. The statistics, 4 bytes a norm, and the norm
    weights, which stay in cache, are left out.

    Backward could read x' alone in place of x and f, if n were recovered as x' / weight; that fails
    where a weight is 0 and loses digits near it, so it is not done.

    Args:
        hidden_size: h.
        f_dtype: type of the branch's output.
        z_dtype: type of the next branch's input; None if there is none.
    """
    stream, f = torch.float32.itemsize, f_dtype.itemsize
    z = z_dtype.itemsize if z_dtype is not None else 0
    forward = stream + f + stream + z
    backward = stream + f + stream + z + stream + f
    return forward * hidden_size, backward * hidden_size
