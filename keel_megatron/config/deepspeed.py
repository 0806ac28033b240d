"""`deepspeed`: settings that only the DeepSpeed engine has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keel_megatron.config.section import Section


class DeepSpeedConfig(Section):
    """ZeRO settings; batch, precision, optimizer and schedule are set in the other sections."""

    zero_stage: Literal[1, 2, 3] = Field(
        default=2,
        description=(
            "ZeRO stage: what is sharded across replicas. 1: optimizer state. 2: optimizer "
            "state and gradients. 3: optimizer state, gradients and parameters."
        ),
    )
    offload_optimizer: bool = Field(
        default=False,
        description=(
            "Keep master weights and optimizer state in host memory, and update them on the CPU."
        ),
    )
    offload_parameters: bool = Field(
        default=False,
        description=(
            "Keep parameters in host memory until a block needs them. Needs zero_stage: 3 and "
            "offload_optimizer: true."
        ),
    )
    bucket_size: int = Field(
        default=50_000_000,
        gt=0,
        description=(
            "Elements per ZeRO bucket: the size of reduce and all-gather buckets, and of the "
            "prefetch."
        ),
    )
