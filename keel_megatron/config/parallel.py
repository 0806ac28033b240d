"""`parallel`: how the model is spread over devices."""

from __future__ import annotations

from typing import Literal

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
    recompute: Literal["none", "full"] = Field(
        default="none",
        description="full = keep a block's input only and compute the block again going back.",
    )
    timeout_seconds: float = Field(
        default=600.0, gt=0.0, description="Longest wait of a collective before the run ends."
    )

    @property
    def model_parallel_size(self) -> int:
        """Devices that hold one replica of the model."""
        return self.tensor * self.pipeline
