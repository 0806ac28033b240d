"""`kernels`: implementations of the model's modules and kernels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keel_megatron.config.section import Section

TritonKernel = Literal["norm", "rotary", "swiglu", "cross_entropy"]

_TILE = 128
"""Rows of a tile in a GPU's matrix product."""


class KernelsConfig(Section):
    """Implementations of the same mathematics: backend, number format, compilation."""

    backend: Literal["auto", "torch", "apex", "transformer_engine"] = Field(
        default="auto",
        description=(
            "Implementation of the blocks' modules. torch: Megatron-core's parallel linear "
            "layers and torch's attention. apex: as torch, with Apex's gradient-accumulation "
            "kernel. transformer_engine: Transformer Engine's linear layers and attention. "
            "auto: apex where installed, else torch. Megatron-core chooses Adam separately: "
            "Transformer Engine's or Apex's where installed, else torch's."
        ),
    )
    fp8: Literal["none", "e4m3", "hybrid"] = Field(
        default="none",
        description=(
            "FP8 format of the blocks' matrix products, with per-tensor current scaling. none: "
            "no FP8. e4m3: E4M3 everywhere. hybrid: E4M3 in the forward pass, E5M2 for "
            "gradients. Needs backend: transformer_engine and training.precision: bf16."
        ),
    )
    attention: Literal["auto", "cudnn", "flash"] = Field(
        default="auto",
        description=(
            "Kernel that torch's attention tries first on CUDA. cudnn: cuDNN's. flash: "
            "FlashAttention-2. auto: cudnn on Hopper and Blackwell where data.seq_length is a "
            "multiple of 128, else torch's own order. keel doctor CONFIG names the kernel that "
            "is used."
        ),
    )
    logits_mib: float = Field(
        default=2048.0,
        gt=0.0,
        description=(
            "Memory limit for fp32 logits per device, in MiB; their softmax takes as much "
            "again. Above the limit, the output layer and the loss run in chunks, and the "
            "backward pass recomputes each chunk's logits: the output layer costs a third "
            "more, and the full logits are never in memory. The default fits 4096 tokens with "
            "a vocabulary of 2^17; at that size, values below 512 make a GPU's matrix products "
            "inefficient."
        ),
    )
    triton: tuple[TritonKernel, ...] = Field(
        default=("norm", "rotary", "swiglu", "cross_entropy"),
        strict=False,
        description=(
            "Operations that run as Triton kernels on CUDA: norm (scaled add and norms), rotary "
            "(split and rotation of query, key and value), swiglu, cross_entropy (loss and "
            "gradient in place of the logits, which stay bf16 under bf16). The others, and all of "
            "them on a CPU or without Triton, run as PyTorch operators. []: no Triton kernels."
        ),
    )
    compile: bool = Field(
        default=False,
        description=(
            "Compile blocks with torch.compile, one graph per kind of block, in the first "
            "steps. Needs a C++ compiler on a CPU, or Triton on CUDA. Needs parallel.tensor: 1 "
            "and backend: auto or torch."
        ),
    )
    cuda_graphs: bool = Field(
        default=False,
        description=(
            "Replay the forward and backward passes of all blocks as two CUDA graphs, captured "
            "in the first step without a depth profile. Needs one GPU per replica, "
            "training.precision: bf16, backend: auto or torch, and no recomputation."
        ),
    )

    def rows_at_once(self, vocabulary: int) -> int:
        """Number of tokens whose logits fit into `logits_mib`; at least one.

        Args:
            vocabulary: vocabulary entries on this device.
        """
        rows = max(1, int(self.logits_mib * 2**20) // (4 * vocabulary))
        # Round down to whole tiles of the matrix product, where at least one fits.
        return rows if rows < _TILE else rows - rows % _TILE
