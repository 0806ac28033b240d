"""`parallel`: parallelism over devices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from keel_megatron.config.section import Section


class ParallelConfig(Section):
    """Tensor, pipeline and sequence parallelism; the data-parallel size is what remains."""

    tensor: int = Field(default=1, gt=0, description="Tensor-parallel size (devices).")
    pipeline: int = Field(default=1, gt=0, description="Pipeline-parallel size (stages).")
    virtual_pipeline: int = Field(
        default=1,
        gt=0,
        description=("Model chunks per pipeline stage. 1: 1F1B schedule. More: interleaved 1F1B."),
    )
    sequence: bool = Field(
        default=False,
        description=(
            "Sequence parallelism: shard norms and the residual stream along the sequence over "
            "the tensor-parallel group. Needs tensor > 1."
        ),
    )
    distributed_optimizer: bool = Field(
        default=True, description="Shard the optimizer state over the data-parallel group."
    )
    overlap_grad_reduce: bool = Field(
        default=False,
        description=(
            "Overlap the reduction of gradients over the data-parallel group with the backward "
            "pass. Not yet run on several GPUs."
        ),
    )
    overlap_param_gather: bool = Field(
        default=False,
        description=(
            "Overlap the gather of updated weights over the data-parallel group with the next "
            "forward pass. Needs distributed_optimizer. Not yet run on several GPUs."
        ),
    )
    layout: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description=(
            "Number of blocks in each model chunk, in model order; chunk i is on stage i % "
            "pipeline. null: balanced automatically, with the embedding's and the output "
            "layer's costs included."
        ),
    )
    recompute: Literal["none", "light", "full", "auto"] = Field(
        default="none",
        description=(
            "Activation recomputation. none: keep all activations. light: recompute SwiGLU's "
            "output and the inner norms' outputs in the backward pass (a quarter less "
            "activation memory for about 5 % of the time; the same bits). full: keep each "
            "block's input and recompute the block in the backward pass. auto: as little as "
            "fits in memory, per stage: light for as few blocks as possible, then full."
        ),
    )
    memory_gb: float | None = Field(
        default=None,
        gt=0.0,
        description=(
            "Memory limit per device for the model, in GB. null: the device's memory (no limit "
            "on a CPU)."
        ),
    )
    timeout_seconds: float = Field(
        default=600.0,
        gt=0.0,
        description=(
            "Timeout of a collective operation, in seconds. The run ends when it expires."
        ),
    )
    preflight: Literal["auto", "always", "never"] = Field(
        default="auto",
        description=(
            "Checks before training: compare the nodes (versions, code, configuration, "
            "devices, clocks), test that their folders are shared, and measure the bandwidth "
            "between them. auto: on more than one node."
        ),
    )

    @property
    def model_parallel_size(self) -> int:
        """Number of devices per replica of the model."""
        return self.tensor * self.pipeline
