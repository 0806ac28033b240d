"""`guard`: what is done about a loss or gradient that is not finite, or that spikes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from keel_megatron.config.base import Section


class GuardConfig(Section):
    """Judges every step's loss and gradient norm before the weights are updated."""

    action: Literal["off", "warn", "skip", "rollback"] = Field(
        default="warn",
        description="For a step whose loss or gradient norm spikes: off = spikes are not looked "
        "for; warn = report it and take it; skip = leave weights and optimizer as they are; "
        "rollback = return to the last checkpoint and jump over all batches since then. A step "
        "that is not finite is never taken: rollback does the same there, the others skip it.",
    )
    window: int = Field(
        default=128,
        ge=8,
        description="Latest accepted steps whose median and spread a spike is measured by. After "
        "a spike or a step that is not finite, so many more must be accepted before the newest "
        "checkpoint from before it may be removed.",
    )
    min_steps: int = Field(
        default=32, ge=8, description="Accepted steps before spikes are looked for."
    )
    threshold: float = Field(
        default=10.0,
        gt=0.0,
        description="A spike lies more than so many robust standard deviations (1.4826 x the "
        "median absolute deviation) above the median of the window.",
    )
    limit: int = Field(
        default=5,
        gt=0,
        description="Skips in a row, or rollbacks within limit_steps, that are borne; one more "
        "ends the run with 65.",
    )
    limit_steps: int = Field(
        default=1000, gt=0, description="Steps in which rollbacks are counted against the limit."
    )

    @field_validator("action", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML 1.1 reads `off` without quotes as false."""
        return "off" if value is False else value
