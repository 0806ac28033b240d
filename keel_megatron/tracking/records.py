"""Records of a run: steps, validations, evaluations, checkpoints and depth profiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

EVALUATION = "evaluation/"
"""Beginning of the names of the tasks' metrics."""
Status = Literal["FINISHED", "FAILED", "KILLED"]
"""How a run ended: complete; by an error or a kill; by a request to stop."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """Number of the step; the first is 1."""
    loss: float
    """Mean cross entropy of the global batch, nats per token."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate of the step."""
    consumed_samples: int
    """Sequences seen so far in the run, this step's included."""
    consumed_tokens: int
    """Tokens seen so far in the run, this step's included."""
    tokens_per_second: float
    """Tokens per second over all devices."""
    tflops_per_device: float
    """Model FLOPs per second and device, in 1e12."""
    memory_gb: float
    """Peak memory of the reporting rank, in 1e9 bytes."""
    seconds: float
    """Duration of the step in seconds."""
    skipped_steps: int = 0
    """Steps so far in the run whose update was skipped."""
    data_seconds: float = 0.0
    """Part of the step's duration for which it waited for its batches."""

    def to_json(self) -> dict[str, float]:
        """The record as one flat object, with the fields' names as keys."""
        return asdict(self)


@dataclass(frozen=True)
class ValidationRecord:
    """One validation."""

    step: int
    """Last step before the validation."""
    validation_loss: float
    """Mean cross entropy of the validation sequences, nats per token; of several sources, the mean
    weighted by their shares of the training samples."""
    consumed_samples: int
    """Training sequences seen so far in the run."""
    consumed_tokens: int
    """Training tokens seen so far in the run."""
    sources: Mapping[str, float] = field(default_factory=dict)
    """The same mean for each source by name, where there are several."""

    def to_json(self) -> dict[str, float]:
        """The record as one flat object; keys are the fields' names, and validation/NAME/loss."""
        record = asdict(self)
        del record["sources"]
        return record | {f"validation/{name}/loss": loss for name, loss in self.sources.items()}


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation of tasks."""

    step: int
    """Last step before the evaluation."""
    results: Mapping[str, Mapping[str, float]]
    """Of each task by name, its metrics by name."""
    seconds: float | None = None
    """Time for which training waited; None: it did not."""

    def to_json(self) -> dict[str, float]:
        """The record as one flat object; keys are evaluation/TASK/METRIC."""
        record: dict[str, float] = {"step": self.step}
        if self.seconds is not None:
            record["evaluation_seconds"] = self.seconds
        for task, metrics in self.results.items():
            record |= {f"{EVALUATION}{task}/{name}": value for name, value in metrics.items()}
        return record


@dataclass(frozen=True)
class CheckpointRecord:
    """One checkpoint, once it is complete."""

    step: int
    """Step of the checkpoint."""
    checkpoint_stall_seconds: float
    """Time for which training waited: the copy to the host, and work that did not overlap."""
    checkpoint_seconds: float
    """Time from start to publication."""
    checkpoint_bytes: int
    """Approximate size of all ranks' files."""

    def to_json(self) -> dict[str, float]:
        """The record as one flat object, with the fields' names as keys."""
        return asdict(self)


Record = StepRecord | ValidationRecord | EvaluationRecord | CheckpointRecord


class DepthRecord(Protocol):
    """The depth profile of a step (depth/profile.py)."""

    def to_json(self) -> dict[str, Any]:
        """`step`, and `depth` with one list per quantity."""

    def alarm(self) -> str | None:
        """A message that names the first non-finite values; None if all are finite."""
