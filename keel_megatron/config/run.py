"""The whole configuration of a run, and the checks that cross its sections."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from keel_megatron.config.base import Section
from keel_megatron.config.data import DataConfig
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
    data: DataConfig = Field(description="The text.")
    optimizer: OptimizerConfig = Field(description="AdamW.")
    schedule: ScheduleConfig = Field(
        default_factory=ScheduleConfig, description="The learning rate over the steps."
    )
    training: TrainingConfig = Field(description="The run.")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="What is saved."
    )
    tracking: TrackingConfig = Field(
        default_factory=TrackingConfig, description="What is reported."
    )

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model among `world_size` processes (exact after `problems` is empty)."""
        return world_size // self.parallel.model_parallel_size


def problems(config: RunConfig, world_size: int | None = None) -> Iterator[tuple[str, str]]:
    """Contradictions between settings, each as (path of the setting, what would be right).

    Args:
        config: a configuration whose single values are valid.
        world_size: processes of the run; None leaves out the checks that need it.
    """
    yield from _model_problems(config)
    yield from _parallel_problems(config)
    if config.schedule.warmup_steps >= config.training.steps and config.schedule.warmup_steps:
        yield (
            "schedule.warmup_steps",
            f"{config.schedule.warmup_steps} must be smaller than training.steps = "
            f"{config.training.steps}",
        )
    if config.schedule.min_learning_rate > config.optimizer.learning_rate:
        yield (
            "schedule.min_learning_rate",
            f"{config.schedule.min_learning_rate} must not exceed optimizer.learning_rate = "
            f"{config.optimizer.learning_rate}",
        )
    if world_size is not None:
        yield from _world_problems(config, world_size)


def _model_problems(config: RunConfig) -> Iterator[tuple[str, str]]:
    model = config.model
    if model.hidden_size % model.num_attention_heads:
        yield (
            "model.num_attention_heads",
            f"{model.num_attention_heads} must divide model.hidden_size = {model.hidden_size}",
        )
    elif model.head_dim % 2:
        yield (
            "model.num_attention_heads",
            f"hidden_size / heads = {model.head_dim} must be even for the rotary embedding",
        )
    if model.num_attention_heads % model.query_groups:
        yield (
            "model.num_query_groups",
            f"{model.query_groups} must divide model.num_attention_heads = "
            f"{model.num_attention_heads}",
        )
    if model.alpha != "auto":
        if model.alpha <= 0:
            yield "model.alpha", f"{model.alpha} must be auto or a positive number"
        elif model.residual in ("pre_ln", "post_ln", "hybrid_norm", "mix_ln"):
            yield "model.alpha", f"{model.alpha} has no place in {model.residual}; leave it at auto"
    if model.first_block != "v2" and model.residual != "keel":
        yield (
            "model.first_block",
            f"{model.first_block} has no place in {model.residual}; keel only",
        )


def _parallel_problems(config: RunConfig) -> Iterator[tuple[str, str]]:
    model, parallel, training = config.model, config.parallel, config.training
    for path, value in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", model.query_groups),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("data.vocab_size", config.data.vocab_size),
    ):
        if value % parallel.tensor:
            yield (
                path,
                f"{value} must be a multiple of parallel.tensor = {parallel.tensor}",
            )
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence", "true needs parallel.tensor > 1 (set it to false or raise TP)"
    if parallel.sequence and config.data.seq_length % parallel.tensor:
        yield (
            "data.seq_length",
            f"{config.data.seq_length} must be a multiple of parallel.tensor = "
            f"{parallel.tensor} under parallel.sequence",
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            "parallel.virtual_pipeline",
            f"{parallel.virtual_pipeline} needs parallel.pipeline > 1 (or set it to 1)",
        )
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if chunks > model.blocks:
        yield (
            "parallel.pipeline",
            f"{parallel.pipeline} stages x {parallel.virtual_pipeline} chunks need at least "
            f"{chunks} blocks; model.blocks = {model.blocks}",
        )
    if training.global_batch_size % training.micro_batch_size:
        yield (
            "training.global_batch_size",
            f"{training.global_batch_size} must be a multiple of training.micro_batch_size = "
            f"{training.micro_batch_size}",
        )


def _world_problems(config: RunConfig, world_size: int) -> Iterator[tuple[str, str]]:
    parallel, training = config.parallel, config.training
    replica = parallel.model_parallel_size
    if world_size % replica:
        yield (
            "parallel.tensor x parallel.pipeline",
            f"{parallel.tensor} x {parallel.pipeline} = {replica} must divide the "
            f"{world_size} process(es) of this launch; start "
            f"torchrun --nproc-per-node {replica}, or change the layout",
        )
        return
    replicas = world_size // replica
    batch = training.micro_batch_size * replicas
    if training.global_batch_size % batch:
        yield (
            "training.global_batch_size",
            f"{training.global_batch_size} must be a multiple of micro_batch_size x replicas = "
            f"{training.micro_batch_size} x {replicas} = {batch}",
        )
        return
    micro_batches = training.global_batch_size // batch
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        yield (
            "training.global_batch_size",
            f"{training.global_batch_size} makes {micro_batches} micro-batches a replica; "
            f"interleaving needs a multiple of parallel.pipeline = {parallel.pipeline}",
        )
