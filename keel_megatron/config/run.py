"""The whole configuration of a run; `checks.py` holds what crosses its sections."""

from __future__ import annotations

from pydantic import Field

from keel_megatron.config.base import Section
from keel_megatron.config.data import DataConfig
from keel_megatron.config.deepspeed import DeepSpeedConfig
from keel_megatron.config.guard import GuardConfig
from keel_megatron.config.kernels import KernelsConfig
from keel_megatron.config.model import ModelConfig
from keel_megatron.config.optimizer import OptimizerConfig, ScheduleConfig
from keel_megatron.config.parallel import ParallelConfig
from keel_megatron.config.training import CheckpointConfig, TrackingConfig, TrainingConfig


class RunConfig(Section):
    """Everything that defines a run; saved resolved in the run's folder and checkpoints."""

    model: ModelConfig = Field(description="The network.")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="Its spread over devices."
    )
    kernels: KernelsConfig = Field(
        default_factory=KernelsConfig, description="Whose modules it is made of."
    )
    deepspeed: DeepSpeedConfig = Field(
        default_factory=DeepSpeedConfig, description="ZeRO, for training.engine: deepspeed."
    )
    data: DataConfig = Field(description="The text.")
    optimizer: OptimizerConfig = Field(description="AdamW.")
    schedule: ScheduleConfig = Field(
        default_factory=ScheduleConfig, description="The learning rate over the steps."
    )
    training: TrainingConfig = Field(description="The run.")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="What is saved."
    )
    guard: GuardConfig = Field(
        default_factory=GuardConfig, description="What is done about a bad step."
    )
    tracking: TrackingConfig = Field(
        default_factory=TrackingConfig, description="What is reported."
    )

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model among `world_size` processes (exact after `problems` is empty)."""
        return world_size // self.parallel.model_parallel_size

    @property
    def hang_timeout(self) -> float:
        """Seconds without progress after which the watchdog acts; 0 = there is none."""
        chosen = self.training.hang_timeout
        return self.parallel.timeout_seconds / 2 if chosen is None else chosen
