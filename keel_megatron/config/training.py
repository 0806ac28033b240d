"""`training`, `checkpoint` and `tracking`: the run itself, what it keeps, what it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from keel_megatron.config.base import Section, TextPath


class TrainingConfig(Section):
    """Name, length, batch and precision of a run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="The run's name: its folder is runs_dir/name, its MLflow run is called so.",
    )
    steps: int = Field(gt=0, description="Optimizer steps of the whole run.")
    global_batch_size: int = Field(gt=0, description="Sequences of one optimizer step.")
    micro_batch_size: int = Field(
        default=1, gt=0, description="Sequences of one forward pass on one replica."
    )
    engine: Literal["megatron", "deepspeed"] = Field(
        default="megatron",
        description=(
            "What trains: Megatron-core's schedules, DDP and optimizer, or DeepSpeed's ZeRO."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16",
        description="Type of the matrix products; the residual stream is fp32 in both.",
    )
    seed: int = Field(default=1234, ge=0, description="Seed of weights, data order and dropout.")
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="auto = CUDA with NCCL where present, else CPU with gloo."
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads of a process; 0 = cores that it may use (affinity, container's "
        "quota) / processes per node.",
    )
    validate_every: int = Field(
        default=0, ge=0, description="Steps between validations; 0 = only at the end."
    )
    validation_sequences: int = Field(
        default=64, gt=0, description="Sequences of one validation (fewer if the set is smaller)."
    )
    exit_after: float | None = Field(
        default=None,
        gt=0.0,
        description="Minutes from the start of the launch after which the run finishes its step, "
        "saves and exits with 75; null = never. Leave time for a step and a save.",
    )
    hang_timeout: float | None = Field(
        default=None,
        ge=0.0,
        description="Seconds without a completed step, validation or save after which the watchdog "
        "ends the run with 70; null = half of parallel.timeout_seconds; 0 = no watchdog.",
    )
    runs_dir: TextPath = Field(default=Path("runs"), description="Parent of the run's folder.")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs_dir / self.name


class CheckpointConfig(Section):
    """When a run is saved and how many saves are kept."""

    every: int = Field(
        default=0, ge=0, description="Steps between checkpoints; 0 = only at the end."
    )
    keep: int = Field(
        default=2,
        gt=0,
        description="Newest checkpoints that are kept; beside them the newest from before a recent "
        "spike or a step that is not finite (guard.window).",
    )
    keep_every: int = Field(
        default=0,
        ge=0,
        description="Checkpoints of multiples of so many steps are kept for good; 0 = none.",
    )
    asynchronous: bool = Field(
        default=True,
        description=(
            "Training goes on while files are written; takes host memory for a copy of the state."
        ),
    )
    on_error: Literal["stop", "continue"] = Field(
        default="stop",
        description=(
            "When a checkpoint cannot be written: stop the run, or go on and try again at the "
            "next. One that would hold NaN or infinity always stops it, with 65."
        ),
    )


class TrackingConfig(Section):
    """What a run reports, and where."""

    mlflow: bool = Field(default=True, description="Report to MLflow.")
    uri: str | None = Field(
        default=None,
        description="MLflow tracking URI, without user, password or anything else that may be a "
        "secret: credentials come from MLflow's own environment variables; null = a sqlite file, "
        "mlflow.db in the run's folder.",
    )
    experiment: str = Field(default="keel", description="MLflow experiment.")
    system_metrics_every: float = Field(
        default=10.0,
        ge=0.0,
        description="Seconds between measurements of every node's machine for MLflow; 0 = none.",
    )
    depth_every: int = Field(
        default=100,
        ge=0,
        description="Steps between depth profiles, beside step 1; 0 = none at all.",
    )
    log_every: int = Field(default=1, gt=0, description="Steps between lines of the progress.")
    sample_prompt: str | None = Field(
        default=None, description="Text that the trained model continues at the end of the run."
    )
