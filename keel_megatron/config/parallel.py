"""`parallel`: how the model is spread over devices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from keel_megatron.config.base import Section


class ParallelConfig(Section):
    """Tensor, pipeline and sequence parallelism; data parallelism is what the world leaves."""

    tensor: int = Field(default=1, gt=0, description="Tensor-parallel size.")
    pipeline: int = Field(default=1, gt=0, description="Pipeline stages.")
    virtual_pipeline: int = Field(
        default=1, gt=0, description="Model chunks per pipeline stage (interleaved 1F1B if > 1)."
    )
    sequence: bool = Field(
        default=False,
        description="Shard norms and the residual stream along the sequence over the tensor group.",
    )
    distributed_optimizer: bool = Field(
        default=True, description="Shard the optimizer's state over the data-parallel group."
    )
    layout: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description=(
            "Blocks of every chunk in order (chunk i is on stage i % pipeline); null = computed, "
            "with embedding and head counted in."
        ),
    )
    recompute: Literal["none", "full", "auto"] = Field(
        default="none",
        description=(
            "full = keep a block's input only and compute the block again going back; auto = so "
            "many blocks of every stage as it needs to fit into memory."
        ),
    )
    memory_gb: float | None = Field(
        default=None,
        gt=0.0,
        description=(
            "Memory of a device that the model may use, in GB; null = what the device has "
            "(a CPU: no limit)."
        ),
    )
    timeout_seconds: float = Field(
        default=600.0, gt=0.0, description="Longest wait of a collective before the run ends."
    )
    preflight: Literal["auto", "always", "never"] = Field(
        default="auto",
        description=(
            "Before training, compare the nodes (versions, code, configuration, devices, clocks), "
            "see that their folders are shared, and probe the links between them; auto = on "
            "several nodes."
        ),
    )

    @property
    def model_parallel_size(self) -> int:
        """Devices that hold one replica of the model."""
        return self.tensor * self.pipeline
