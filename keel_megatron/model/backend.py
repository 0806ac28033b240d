"""`kernels.backend`: what the linears and the attention are made of, and what is fused.

The optimizer's Adam is not chosen here: Megatron-core takes Transformer Engine's fused one where it
can import it, else Apex's, else torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keel_megatron.config.errors import UserError
from keel_megatron.config.run import RunConfig
from keel_megatron.kernels import libraries

Modules = Literal["local", "transformer_engine"]


@dataclass(frozen=True)
class Backend:
    """What `kernels.backend` comes to on this machine."""

    modules: Modules
    """local = Megatron-core's linears and torch's attention."""
    gradient_fusion: bool
    """Whether a weight's gradient is added to the accumulated one within its matrix product."""


def choose_backend(config: RunConfig | None, device: str) -> Backend:
    """Resolve `kernels.backend`.

    Only Megatron-core's DDP has the fp32 gradients that the fusion adds to; ZeRO accumulates its
    own.

    Args:
        config: the run; None = one with the defaults.
        device: `cuda` or `cpu`; on a CPU auto is torch.

    Raises:
        UserError: what is asked for by name is not there.
    """
    asked = "auto" if config is None else config.kernels.backend
    accumulates = config is None or config.training.engine == "megatron"
    # A compiled or recorded block hands its gradients to autograd.
    if config is not None and (config.kernels.compile or config.kernels.cuda_graphs):
        accumulates = False
    if asked == "transformer_engine":
        if not libraries.has_transformer_engine():
            raise UserError(
                "kernels.backend: transformer_engine is asked for, but Transformer Engine cannot "
                "be imported; use an image that has it, install transformer-engine[pytorch], or "
                "choose torch"
            )
        return Backend("transformer_engine", accumulates)
    if asked == "apex":
        if not (libraries.has_apex_adam() and libraries.has_gradient_fusion()):
            raise UserError(
                "kernels.backend: apex is asked for, but NVIDIA's Apex cannot be imported (amp_C, "
                "apex.optimizers, fused_weight_gradient_mlp_cuda); build it from "
                "github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or choose torch"
            )
        return Backend("local", accumulates)
    fused = asked == "auto" and device == "cuda" and libraries.has_gradient_fusion()
    return Backend("local", accumulates and fused)


def describe_backend(backend: Backend) -> str:
    """What the blocks are made of, in words."""
    whose = "torch" if backend.modules == "local" else "Transformer Engine"
    return f"{whose}, gradient fusion {'on' if backend.gradient_fusion else 'off'}"


def describe_adam(config: RunConfig | None, device: str) -> str:
    """Whose Adam the engine will take; arguments as of `choose_backend`."""
    if config is not None and config.training.engine == "deepspeed":
        offloaded = device == "cuda" and config.deepspeed.offload_optimizer
        return "DeepSpeed's for the CPU" if offloaded else "torch's"
    if libraries.has_transformer_engine():
        return "Transformer Engine's"
    return "Apex's" if libraries.has_apex_adam() else "torch's"
