"""`kernels`: whose modules the blocks are made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keel_megatron.config.base import Section

_TILE = 128
"""Rows that a GPU's matrix product does together."""


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
    logits_mib: float = Field(
        default=2048.0,
        gt=0.0,
        description=(
            "MiB that the fp32 logits of a device may take at once (a softmax of them as much "
            "again). More tokens than that go through the output layer and the loss in pieces, "
            "whose logits the backward pass makes again: a third more work for the head, and never "
            "all logits in memory. The default holds 4096 tokens of a vocabulary of 2^17; below "
            "512 a GPU's products become inefficient at such a vocabulary."
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

    def rows_at_once(self, vocabulary: int) -> int:
        """How many tokens' logits are within `logits_mib`; at least one.

        Args:
            vocabulary: the device's share of it.
        """
        rows = max(1, int(self.logits_mib * 2**20) // (4 * vocabulary))
        # Whole tiles of a matrix product, where there are any.
        return rows if rows < _TILE else rows - rows % _TILE
