"""`kernels`: whose modules the blocks are made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keel_megatron.config.base import Section


class KernelsConfig(Section):
    """The family of modules behind the same mathematics."""

    backend: Literal["auto", "torch", "apex", "transformer_engine"] = Field(
        default="auto",
        description=(
            "torch = Megatron-core's parallel linears and torch's attention; apex = those, with "
            "gradients accumulated by Apex's kernel; transformer_engine = Transformer Engine's "
            "linears and attention; auto = apex where it is installed, else torch. Adam is "
            "Transformer Engine's or Apex's wherever it can be imported, as Megatron-core chooses."
        ),
    )
    fp8: Literal["none", "e4m3", "hybrid"] = Field(
        default="none",
        description=(
            "Format of the blocks' matrix products under backend: transformer_engine, scaled "
            "tensor by tensor as they are; hybrid = e4m3, and e5m2 for gradients."
        ),
    )
    compile: bool = Field(
        default=False,
        description=(
            "Train on blocks compiled by torch.compile: one graph for all blocks of a kind, made "
            "in the first steps; needs a C++ compiler, or Triton on CUDA. One device a stage, "
            "torch's modules."
        ),
    )
    cuda_graphs: bool = Field(
        default=False,
        description=(
            "Replay the passes through all blocks as two CUDA graphs, recorded in the first step "
            "without a depth profile. One GPU a replica, bf16, torch's modules, nothing recomputed."
        ),
    )
