"""`guard`: detection of losses and gradient norms that spike or are not finite."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from keel_megatron.config.section import Section


class GuardConfig(Section):
    """Check of each step's loss and gradient norm before the weights are updated."""

    action: Literal["off", "warn", "skip", "rollback"] = Field(
        default="warn",
        description=(
            "Action on a step whose loss or gradient norm spikes. off: no spike detection. "
            "warn: report the spike and apply the update. skip: discard the update. rollback: "
            "return to the last checkpoint and skip all batches since then. An update that is "
            "not finite is never applied: rollback returns to the last checkpoint, the others "
            "skip it."
        ),
    )
    window: int = Field(
        default=128,
        ge=8,
        description=(
            "Number of most recent accepted steps that define the median and the spread of a "
            "spike. After a spike or a non-finite step, the newest checkpoint from before it "
            "is kept until this many further steps are accepted."
        ),
    )
    min_steps: int = Field(
        default=32, ge=8, description="Accepted steps before spike detection starts."
    )
    threshold: float = Field(
        default=10.0,
        gt=0.0,
        description=(
            "Spike threshold, in robust standard deviations (1.4826 x the median absolute "
            "deviation) above the median of the window."
        ),
    )
    limit: int = Field(
        default=5,
        gt=0,
        description=(
            "Maximum consecutive skips, or rollbacks within limit_steps, before the run stops "
            "with exit code 65."
        ),
    )
    limit_steps: int = Field(
        default=1000, gt=0, description="Number of steps over which rollbacks count towards limit."
    )

    @field_validator("action", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML 1.1 reads `off` without quotes as false."""
        return "off" if value is False else value
