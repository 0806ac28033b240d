"""What a run reports: one record a step, one a validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    step: int
    loss: float
    """Mean cross entropy of the global batch, nats per token."""
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    consumed_samples: int
    """Sequences seen so far in the run."""
    consumed_tokens: int
    tokens_per_second: float
    """Of the whole run, all devices together."""
    tflops_per_device: float
    """Model FLOPs (partition/flops.py) in 1e12 a second and device."""
    memory_gb: float
    """Peak memory of the reporting rank in 1e9 bytes."""
    seconds: float
    """Duration of the step."""

    def values(self) -> dict[str, float]:
        """The record as one flat object."""
        return asdict(self)


@dataclass(frozen=True)
class ValidationRecord:
    """One validation."""

    step: int
    validation_loss: float
    """Mean cross entropy of the validation sequences, nats per token."""
    consumed_samples: int
    consumed_tokens: int

    def values(self) -> dict[str, float]:
        """The record as one flat object."""
        return asdict(self)


Record = StepRecord | ValidationRecord
