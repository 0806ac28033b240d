"""Stand-ins of the kernels that need data or a GPU.

Each makes the tensors that its kernel makes and keeps those that it keeps, of the same shapes and
types, and computes nothing. Attention needs none: on CUDA torch calls an operator whose shapes it
knows itself, which is called here by name.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Launched = Callable[[str], None]
"""Is told of a kernel's name."""


def scaled_add_norm_function(launched: Launched, processors: int) -> Any:
    """The autograd function in the place of `kernels.triton_norm.ScaledAddNorm`.

    Args:
        launched: told of every kernel.
        processors: streaming multiprocessors of the device.
    """

    class ScaledAddNorm(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            f: Tensor,
            alpha: float,  # noqa: ARG004
            outer_gain: Tensor | None,
            inner_gain: Tensor | None,
            eps: float,  # noqa: ARG004
            z_dtype: torch.dtype,
        ) -> tuple[Tensor, Tensor | None]:
            x, f = x.contiguous(), f.contiguous()
            rows = x.numel() // x.size(-1)
            x_new = torch.empty_like(x)
            z = torch.empty_like(x, dtype=z_dtype) if inner_gain is not None else None
            rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device)
            launched("triton forward")
            ctx.save_for_backward(x, f, outer_gain, inner_gain, rstd)
            return x_new, z

        @staticmethod
        def backward(ctx: Any, dx_new: Tensor, dz: Tensor | None) -> tuple[Tensor | None, ...]:
            x, f, outer_gain, inner_gain, _rstd = ctx.saved_tensors
            h = x.size(-1)
            dx, df = torch.empty_like(x), torch.empty_like(f)
            programs = resident_programs(h, x.numel() // h, processors)
            partial = torch.empty(2, programs, h, dtype=torch.float32, device=x.device)
            operands = (dx_new.contiguous(), None if dz is None else dz.contiguous())
            launched("triton backward")
            del operands
            d_outer, d_inner = partial.sum(1).unbind(0)
            return (
                dx,
                df,
                None,
                None if outer_gain is None else d_outer.to(outer_gain.dtype),
                None if inner_gain is None else d_inner.to(inner_gain.dtype),
                None,
                None,
            )

    return ScaledAddNorm


def resident_programs(h: int, rows: int, processors: int) -> int:
    """Programs of the backward kernel (`triton_norm.backward_tile`, without Triton)."""
    block = 1 << (h - 1).bit_length()
    tile_rows = min(32, 2048 // block) if block <= 1024 else 1
    each = 3 if block <= 1024 else 4096 // block if block <= 4096 else 1
    return max(1, min(each * processors, -(-rows // tile_rows)))


def scaled_add_norm(function: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """`kernels.scaled_add_norm` with the stand-in where CUDA would have the Triton kernel."""
    from keel_megatron.kernels import MAX_TRITON_HIDDEN_SIZE

    def call(x: Tensor, *arguments: Any, backend: str = "auto") -> Any:
        fits = x.dtype == torch.float32 and x.size(-1) <= MAX_TRITON_HIDDEN_SIZE
        if backend == "auto" and x.is_cuda and fits:
            return function.apply(x, *arguments)
        return plain(x, *arguments, backend="torch" if backend == "auto" else backend)

    return call


def rms_norm_function(launched: Launched) -> Any:
    """The autograd function in the place of torch's own RMSNorm kernel on CUDA.

    Torch has it for CUDA alone (`aten._fused_rms_norm`); elsewhere its operators take its place.
    """

    class RmsNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
            rstd = torch.empty(*x.shape[:-1], 1, dtype=x.dtype, device=x.device)
            launched("fused rms norm")
            ctx.save_for_backward(x, gain, rstd)
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, _dy: Tensor) -> tuple[Tensor, Tensor]:
            x, gain, _rstd = ctx.saved_tensors
            launched("fused rms norm backward")
            return torch.empty_like(x), torch.empty_like(gain)

    return RmsNorm


def rms_norm(function: Any) -> Callable[..., Tensor]:
    """`kernels.rms_norm` on CUDA: torch's own kernel, where the types of x and gain are one."""

    def call(x: Tensor, gain: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        if x.is_cuda and x.dtype == gain.dtype:
            normalised: Tensor = function.apply(x, gain)
            return normalised.to(out_dtype)
        return torch.rms_norm(x, (x.size(-1),), gain, eps).to(out_dtype)

    return call


def swiglu(launched: Launched) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Megatron-core's two compiled functions of SwiGLU, forward and backward."""

    def forward(y: Tensor) -> Tensor:
        launched("swiglu")
        return y.new_empty(*y.shape[:-1], y.shape[-1] // 2)

    def backward(_g: Tensor, y: Tensor) -> Tensor:
        launched("swiglu backward")
        return torch.empty_like(y)

    return forward, backward


def attention(which: str) -> types.SimpleNamespace:
    """`torch.nn.functional` of model/attention.py, with the operator that CUDA would choose.

    Args:
        which: `cudnn` or `flash`; fp32 is the memory-efficient one's, whatever is chosen.
    """
    aten: Any = torch.ops.aten

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor:
        if q.dtype == torch.float32:
            if enable_gqa:
                k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
            out = aten._scaled_dot_product_efficient_attention(
                q, k, v, None, True, dropout_p, is_causal
            )
        elif which == "cudnn":
            out = aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, dropout_p, is_causal, False
            )
        else:
            out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False)
        result: Tensor = out[0]
        return result

    return types.SimpleNamespace(scaled_dot_product_attention=call)


def dropout(launched: Launched) -> Callable[..., Tensor]:
    """`torch.nn.functional.dropout` on CUDA: one kernel, which keeps a byte an element."""

    class Dropout(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool, device=x.device))
            launched("dropout")
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            (_mask,) = ctx.saved_tensors
            launched("dropout backward")
            return torch.empty_like(dy)

    def call(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        assert not inplace
        function: Any = Dropout
        return function.apply(x) if training and p > 0.0 else x

    return call


def triton_launch(launched: Launched) -> Callable[..., Any]:
    """`kernel[grid]` of Triton's kernels: the functions around them make all tensors themselves."""

    def launch(kernel: Any, _grid: Any) -> Callable[..., None]:
        name = kernel.fn.__module__.rpartition(".")[2] + kernel.fn.__name__
        return lambda *_args, **_kwargs: launched(name)

    return launch


def install(launched: Launched, processors: int, which: str) -> None:
    """Put all stand-ins in their places, in this process."""
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.tensor_parallel import random

    from keel_megatron import kernels
    from keel_megatron.model import attention as attention_module
    from keel_megatron.model import language_model, layer, norm

    function = scaled_add_norm_function(launched, processors)
    places: list[tuple[Any, str, Any]] = [
        (layer, "scaled_add_norm", scaled_add_norm(function, kernels.scaled_add_norm)),
        (torch.nn.functional, "dropout", dropout(launched)),
        (norm, "rms_norm", rms_norm(rms_norm_function(launched))),
        (attention_module, "functional", attention(which)),
        # Weights are drawn on the device, whose generator is not there.
        (language_model, "initialize", lambda *_args: None),
        # Everything is made on the device already.
        (language_model.LanguageModel, "to", lambda self, *_args, **_kwargs: self),
    ]
    state = torch.cuda.get_rng_state()
    places += [(random, "_get_cuda_rng_state", lambda *_args, **_kwargs: state)]
    places += [(random, "_set_cuda_rng_state", lambda *_args, **_kwargs: None)]
    forward, backward = swiglu(launched)
    places += [(fused_bias_swiglu, "swiglu", forward), (fused_bias_swiglu, "swiglu_back", backward)]
    if kernels.triton_is_installed():
        from triton.runtime.jit import KernelInterface

        places += [(KernelInterface, "__getitem__", triton_launch(launched))]
    for place, name, value in places:
        setattr(place, name, value)
