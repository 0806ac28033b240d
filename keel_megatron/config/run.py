"""The whole configuration of a run; `checks.py` has the checks across sections."""

from __future__ import annotations

from pydantic import Field

from keel_megatron.config.batch_sizes import BatchSizes
from keel_megatron.config.data import DataConfig
from keel_megatron.config.deepspeed import DeepSpeedConfig
from keel_megatron.config.evaluation import EvaluationConfig
from keel_megatron.config.guard import GuardConfig
from keel_megatron.config.kernels import KernelsConfig
from keel_megatron.config.model import ModelConfig
from keel_megatron.config.optimizer import OptimizerConfig, ScheduleConfig
from keel_megatron.config.parallel import ParallelConfig
from keel_megatron.config.section import Section
from keel_megatron.config.training import CheckpointConfig, TrackingConfig, TrainingConfig


class RunConfig(Section):
    """Configuration of a run; the resolved one is saved in the run's folder and checkpoints."""

    model: ModelConfig = Field(description="Model architecture.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="Parallelism over devices."
    )
    kernels: KernelsConfig = Field(
        default_factory=KernelsConfig, description="Implementations of modules and kernels."
    )
    deepspeed: DeepSpeedConfig = Field(
        default_factory=DeepSpeedConfig, description="ZeRO settings for training.engine: deepspeed."
    )
    data: DataConfig = Field(description="Training data, tokenizer and sequences.")
    optimizer: OptimizerConfig = Field(description="Settings of AdamW and Muon.")
    schedule: ScheduleConfig = Field(
        default_factory=ScheduleConfig, description="Schedules of learning rate and batch size."
    )
    training: TrainingConfig = Field(
        description="Length, batch size, precision and device of the run."
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig,
        description="When checkpoints are written, and how many are kept.",
    )
    guard: GuardConfig = Field(
        default_factory=GuardConfig, description="Detection of spikes and non-finite steps."
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="Tasks that are evaluated while training."
    )
    tracking: TrackingConfig = Field(
        default_factory=TrackingConfig, description="Metrics, depth profiles and MLflow."
    )

    def data_parallel_size(self, world_size: int) -> int:
        """Number of replicas among `world_size` processes, once `problems` reports nothing."""
        return world_size // self.parallel.model_parallel_size

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of each step, with `schedule.rampup_batch_size`."""
        full, ramp = self.training.global_batch_size, self.schedule.rampup_batch_size
        if ramp is None:
            return BatchSizes(full)
        increments = (full - ramp.start) // ramp.increment
        return BatchSizes(full, ramp.start, increments, ramp.samples)

    @property
    def hang_timeout(self) -> float:
        """Watchdog timeout in seconds, with the default resolved; 0: no watchdog."""
        chosen = self.training.hang_timeout
        return self.parallel.timeout_seconds / 2 if chosen is None else chosen
