"""The record of a step."""

from __future__ import annotations

import resource
import sys

import torch

from keel_megatron.architecture.flops import training_flops_per_token
from keel_megatron.checkpoint.state import Position
from keel_megatron.config.run import RunConfig
from keel_megatron.engines.base import StepResult
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.tracking.records import StepRecord


def step_record(
    config: RunConfig,
    runtime: Runtime,
    position: Position,
    result: StepResult,
    rate: float,
    seconds: float,
    batch_size: int,
    skipped: int = 0,
    data_seconds: float = 0.0,
) -> StepRecord:
    """The record of a step.

    Args:
        config: the run.
        runtime: this rank's runtime.
        position: after the step.
        result: result of the step.
        rate: its learning rate.
        seconds: its duration.
        batch_size: its global batch size.
        skipped: number of skipped updates so far.
        data_seconds: part of the duration for which it waited for its batches.
    """
    seq_length = config.data.seq_length
    tokens_per_second = batch_size * seq_length / seconds
    flops = training_flops_per_token(config.model, seq_length, config.data.vocab_size)
    return StepRecord(
        step=position.step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        learning_rate=rate,
        consumed_samples=position.consumed_samples,
        consumed_tokens=position.consumed_samples * seq_length,
        tokens_per_second=tokens_per_second,
        tflops_per_device=tokens_per_second * flops / runtime.launch.world_size / 1e12,
        memory_gb=peak_memory_gb(runtime.device),
        seconds=seconds,
        skipped_steps=skipped,
        data_seconds=data_seconds,
    )


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this rank in GB (1e9 bytes): allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
