"""`optimizer` and `schedule`: AdamW and the path of its learning rate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keel_megatron.config.base import Section


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay; the defaults are the paper's."""

    learning_rate: float = Field(gt=0.0, description="Peak learning rate.")
    weight_decay: float = Field(
        default=0.01, ge=0.0, description="Decoupled decay of matrices; norm gains have none."
    )
    clip_grad: float = Field(
        default=1.0, ge=0.0, description="Largest global gradient norm; 0 = no clipping."
    )
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0, description="Adam's first-moment decay.")
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0, description="Adam's second-moment decay.")
    epsilon: float = Field(default=1e-8, gt=0.0, description="Adam's epsilon.")


class ScheduleConfig(Section):
    """Linear warm-up, then a decay to the minimum over the run's remaining steps."""

    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0.")
    decay: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine",
        description="cosine; wsd = stable, then linear over the last decay_fraction; constant.",
    )
    decay_fraction: float = Field(
        default=0.2, gt=0.0, le=1.0, description="wsd: last share of the steps that decays."
    )
    min_learning_rate: float = Field(
        default=1e-7, ge=0.0, description="Learning rate at the last step."
    )
