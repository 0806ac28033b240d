"""`deepspeed`: what the DeepSpeed engine needs and the other sections have no word for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keel_megatron.config.base import Section


class DeepSpeedConfig(Section):
    """ZeRO; batch, precision, optimizer, clipping and schedule are those of the other sections."""

    zero_stage: Literal[1, 2, 3] = Field(
        default=2,
        description=(
            "What the replicas share, for training.engine: deepspeed: 1 = the optimizer's state, "
            "2 = the gradients too, 3 = the parameters too."
        ),
    )
    offload_optimizer: bool = Field(
        default=False, description="Masters and moments in host memory, and the update on the CPU."
    )
    offload_parameters: bool = Field(
        default=False,
        description="Parameters in host memory until a block needs them; needs zero_stage: 3.",
    )
    bucket_elements: int = Field(
        default=50_000_000,
        gt=0,
        description="Elements that are reduced, collected or fetched ahead together.",
    )
