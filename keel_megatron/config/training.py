"""`training`, `checkpoint` and `tracking`: the run, its checkpoints and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from keel_megatron.config.section import Section, TextPath


class TrainingConfig(Section):
    """Name, length, batch size, precision and device of a run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run, of its folder in runs_dir and of its MLflow run.",
    )
    steps: int = Field(gt=0, description="Optimizer steps of the whole run.")
    global_batch_size: int = Field(gt=0, description="Sequences per optimizer step.")
    micro_batch_size: int = Field(
        default=1, gt=0, description="Sequences per forward pass on one replica."
    )
    engine: Literal["megatron", "deepspeed"] = Field(
        default="megatron",
        description=(
            "Training engine. megatron: Megatron-core's schedules, DDP and optimizer. "
            "deepspeed: DeepSpeed's ZeRO."
        ),
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16",
        description="Data type of matrix products. The residual stream is fp32 in both.",
    )
    z_loss: float = Field(
        default=0.0,
        ge=0.0,
        description=(
            "Coefficient of the z-loss: z_loss x log(Z)^2 of every token is added to the training "
            "loss, where Z is the softmax's denominator over the vocabulary. Keeps the logits from "
            "drifting; PaLM used 1e-4. Reported losses, of training and validation, do not include "
            "it. 0: none."
        ),
    )
    seed: int = Field(
        default=1234, ge=0, description="Random seed of weights, data order and dropout."
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto",
        description=("Device type. cuda: NCCL. cpu: gloo. auto: cuda where available, else cpu."),
    )
    deterministic: bool = Field(
        default=False,
        description=(
            "Use only deterministic CUDA kernels: no cuDNN attention, ordered sums in "
            "FlashAttention's backward pass, a fixed cuBLAS workspace. Reduces speed. Has no "
            "effect on a CPU, where runs are always deterministic. "
            "Not supported with kernels.backend: transformer_engine."
        ),
    )
    threads: int = Field(
        default=0,
        ge=0,
        description=(
            "CPU threads per process. 0: available cores (CPU affinity and container quota) / "
            "processes per node."
        ),
    )
    validate_every: int = Field(
        default=0, ge=0, description="Steps between validations. 0: only at the end."
    )
    validation_sequences: int = Field(
        default=64,
        gt=0,
        description=("Sequences per validation, or the whole validation set if it is smaller."),
    )
    gc_every: int = Field(
        default=100,
        ge=0,
        description=(
            "Steps between Python garbage collections, on all ranks at the same step; automatic "
            "collection is off while training. 0: leave automatic collection on."
        ),
    )
    exit_after: float | None = Field(
        default=None,
        gt=0.0,
        description=(
            "Time limit in minutes, from the start of the launch. The run then finishes its "
            "step, saves a checkpoint and exits with 75. Allow time for one step and one save. "
            "null: no limit."
        ),
    )
    hang_timeout: float | None = Field(
        default=None,
        ge=0.0,
        description=(
            "Watchdog timeout, in seconds. The watchdog ends the run with exit code 70 when no "
            "step, validation or save completes for that long. null: half of "
            "parallel.timeout_seconds. 0: no watchdog."
        ),
    )
    initialize_from: TextPath | None = Field(
        default=None,
        description=(
            "Start a new run from the weights of another: RUN (its newest valid checkpoint), "
            "RUN@STEP, a checkpoint's folder or a Hugging Face folder. Architecture and tokenizer "
            "must be the same; layout, engine, data and everything else may differ. Ignored by a "
            "run that has a checkpoint of its own."
        ),
    )
    keep_optimizer: bool = Field(
        default=False,
        description=(
            "Also start from the optimizer state of training.initialize_from: Adam's moments, "
            "Muon's momentum and the count of updates. Needs the same optimizer.name. Without "
            "keep_position the schedule starts at step 1."
        ),
    )
    keep_position: bool = Field(
        default=False,
        description=(
            "Continue training.initialize_from as a resume of it would, under this run's name: "
            "also keep its step, position in the data, random generators and guard statistics. "
            "Needs keep_optimizer. Changes that a resume refuses, such as other data, are refused. "
            "The batch size may change: the data continue after the last sample, and "
            "schedule.rampup_batch_size counts the samples of the origin too."
        ),
    )
    runs_dir: TextPath = Field(
        default=Path("runs"), description="Parent folder of the run's folder."
    )

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs_dir / self.name


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every: int = Field(
        default=0, ge=0, description="Steps between checkpoints. 0: only at the end."
    )
    keep: int = Field(
        default=2,
        gt=0,
        description=(
            "Number of newest checkpoints to keep. The newest checkpoint from before a recent "
            "spike or non-finite step is kept as well (guard.window)."
        ),
    )
    keep_every: int = Field(
        default=0,
        ge=0,
        description=(
            "Keep checkpoints whose step is a multiple of this number permanently. 0: none."
        ),
    )
    async_save: bool = Field(
        default=True,
        description=(
            "Write checkpoint files in the background while training continues. Uses host "
            "memory for a copy of what each rank writes: 12 bytes x its parameters / replicas. "
            "A GPU run uses this memory with false too."
        ),
    )
    on_error: Literal["stop", "continue"] = Field(
        default="stop",
        description=(
            "Action when a checkpoint cannot be written. stop: end the run. continue: train on "
            "and retry at the next checkpoint. A state with NaN or infinity always ends the "
            "run with exit code 65."
        ),
    )


class TrackingConfig(Section):
    """Metrics, depth profiles and MLflow."""

    mlflow: bool = Field(default=True, description="Report to MLflow.")
    uri: str | None = Field(
        default=None,
        description=(
            "MLflow tracking URI. Must not contain a user, a password or any other secret; "
            "credentials come from MLflow's environment variables. null: the SQLite "
            "database runs_dir/mlflow.db, which all runs of the folder share."
        ),
    )
    experiment: str = Field(default="keel", description="Name of the MLflow experiment.")
    system_metrics_every: float = Field(
        default=10.0,
        ge=0.0,
        description=(
            "Interval between system metrics of each node for MLflow, in seconds. 0: none."
        ),
    )
    depth_every: int = Field(
        default=100,
        ge=0,
        description="Steps between depth profiles; step 1 always has one. 0: none at all.",
    )
    log_every: int = Field(default=1, gt=0, description="Steps between progress lines.")
    sample_prompt: str | None = Field(
        default=None,
        description=("Prompt of the sample generated at the end of the run. null: no sample."),
    )
