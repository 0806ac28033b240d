"""Stand-ins of the kernels that need data or a GPU.

Each makes the tensors that its kernel makes and keeps those that it keeps, of the same shapes and
types, and computes nothing. Triton's kernels are not launched; the functions around them run as
they are. Attention needs none: on CUDA torch calls an operator whose shapes it
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
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention by the operator that the chosen backend runs on CUDA."""
        if q.dtype == torch.float32:
            if enable_gqa:
                k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
            out = aten._scaled_dot_product_efficient_attention(
                q, k, v, attn_mask, True, dropout_p, is_causal
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
    """`kernel[grid]` of Triton's kernels: the functions around them make all tensors themselves.

    A launch raises a ValueError, as Triton does, if a kernel of the device is given host memory.
    """

    def launch(kernel: Any, _grid: Any) -> Callable[..., None]:
        """What `kernel[grid]` returns."""
        name = kernel.fn.__module__.rpartition(".")[2] + kernel.fn.__name__

        def run(*args: Any, **_options: Any) -> None:
            given = [one for one in args if isinstance(one, Tensor)]
            if any(one.is_cuda for one in given) and not all(one.is_cuda for one in given):
                raise ValueError(f"{name} has operands on two devices, cuda:0 and cpu")
            launched(name)

        return run

    return launch


def install(launched: Launched, which: str) -> None:
    """Put all stand-ins in their places, in this process.

    Args:
        launched: told of every kernel.
        which: attention's kernel; see `attention`.
    """
    from megatron.core.tensor_parallel import random
    from triton.runtime.jit import KernelInterface

    from keel_megatron.model import attention as attention_module
    from keel_megatron.model import language_model, layer, norm

    state = torch.cuda.get_rng_state()
    places: list[tuple[Any, str, Any]] = [
        (KernelInterface, "__getitem__", triton_launch(launched)),
        (torch.nn.functional, "dropout", dropout(launched)),
        (norm, "rms_norm", rms_norm(rms_norm_function(launched))),
        (layer, "rms_norm", rms_norm(rms_norm_function(launched))),
        (attention_module, "functional", attention(which)),
        # Weights are drawn on the device, whose generator is not there.
        (language_model, "initialize", lambda *_args: None),
        # Everything is made on the device already.
        (language_model, "move", lambda *_args: None),
        (random, "_get_cuda_rng_state", lambda *_args, **_kwargs: state),
        (random, "_set_cuda_rng_state", lambda *_args, **_kwargs: None),
    ]
    for place, name, value in places:
        setattr(place, name, value)
