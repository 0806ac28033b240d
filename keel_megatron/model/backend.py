"""`kernels.backend`: the implementation of linear layers and attention, and gradient fusion.

Adam is not chosen here: Megatron-core uses Transformer Engine's fused one where it can be imported,
else Apex's, else torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.kernels import libraries

Modules = Literal["local", "transformer_engine"]


@dataclass(frozen=True)
class Backend:
    """The resolved `kernels.backend` on this machine."""

    modules: Modules
    """local: Megatron-core's linear layers and torch's attention."""
    gradient_fusion: bool
    """Whether a weight's gradient is added to the accumulated one within its matrix product."""


def choose_backend(config: RunConfig | None, device: str) -> Backend:
    """Resolve `kernels.backend`.

    Gradient fusion needs the fp32 gradient buffers of Megatron-core's DDP; ZeRO has its own.

    Args:
        config: the run; None: the defaults.
        device: `cuda` or `cpu`; on a CPU auto is torch.

    Raises:
        UserError: the requested library is not installed.
    """
    asked = "auto" if config is None else config.kernels.backend
    accumulates = config is None or config.training.engine == "megatron"
    # A compiled or captured block returns its gradients to autograd.
    if config is not None and (config.kernels.compile or config.kernels.cuda_graphs):
        accumulates = False
    if asked == "transformer_engine":
        if not libraries.has_transformer_engine():
            raise UserError(
                "kernels.backend: transformer_engine is set, but Transformer Engine cannot "
                "be imported; use an image that has it, install transformer-engine[pytorch], or "
                "choose torch"
            )
        return Backend("transformer_engine", accumulates)
    if asked == "apex":
        if not (libraries.has_apex_adam() and libraries.has_gradient_fusion()):
            raise UserError(
                "kernels.backend: apex is set, but NVIDIA's Apex cannot be imported (amp_C, "
                "apex.optimizers, fused_weight_gradient_mlp_cuda); build it from "
                "github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or choose torch"
            )
        return Backend("local", accumulates)
    fused = asked == "auto" and device == "cuda" and libraries.has_gradient_fusion()
    return Backend("local", accumulates and fused)


def describe_backend(backend: Backend) -> str:
    """The backend as text."""
    whose = "torch" if backend.modules == "local" else "Transformer Engine"
    return f"{whose}, gradient fusion {'on' if backend.gradient_fusion else 'off'}"


def describe_adam(config: RunConfig | None, device: str) -> str:
    """The Adam implementation that the engine will use; arguments as in `choose_backend`."""
    if config is not None and config.training.engine == "deepspeed":
        offloaded = device == "cuda" and config.deepspeed.offload_optimizer
        return "DeepSpeed's for the CPU" if offloaded else "torch's"
    if libraries.has_transformer_engine():
        return "Transformer Engine's"
    return "Apex's" if libraries.has_apex_adam() else "torch's"
