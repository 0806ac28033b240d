"""The training loop."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

from keel_megatron.checkpoint import state
from keel_megatron.checkpoint.state import Position
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch, BatchSource
from keel_megatron.partition.flops import training_flops_per_token
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.tracking.records import StepRecord, ValidationRecord
from keel_megatron.tracking.tracker import Tracker
from keel_megatron.training.depth import DepthCollector
from keel_megatron.training.engine import MegatronEngine, StepResult
from keel_megatron.training.schedule import learning_rate
from keel_megatron.training.stop import StopRequest


@dataclass
class Loop:
    """Steps from a position to the end of the run.

    A step takes the next `global_batch_size` sequences, trains on them at the step's learning
    rate, and is reported; at their intervals come a validation and a checkpoint; a request to
    stop ends the loop after the step, with a checkpoint.
    """

    config: RunConfig
    runtime: Runtime
    engine: MegatronEngine
    batches: BatchSource
    validation: list[Batch]
    tracker: Tracker
    position: Position
    saved_step: int = 0
    validation_loss: float = float("nan")

    def run(self, stop: StopRequest) -> None:
        """Train until the last step or until a stop is asked for on any rank."""
        steps = self.config.training.steps
        while self.position.step < steps:
            self._step()
            stopping = self.runtime.any(bool(stop))
            last = self.position.step == steps
            if last or (self._due(self.config.training.validate_every) and not stopping):
                self._validate()
            if last or stopping or self._due(self.config.checkpoint.every):
                self.save()
            if stopping:
                break

    def save(self) -> None:
        """Write a checkpoint of the current position, unless it is there already."""
        if self.saved_step == self.position.step:
            return
        path = state.save(
            self.config,
            self.runtime,
            self.engine.chunks,
            self.engine.optimizer,
            self.position,
        )
        self.saved_step = self.position.step
        self.tracker.say(f"saved {path}")
        self.tracker.draw_depth(ending=False)

    def _due(self, every: int) -> bool:
        return every > 0 and self.position.step % every == 0

    def _step(self) -> None:
        config, training = self.config, self.config.training
        step = self.position.step + 1
        started = time.perf_counter()
        rate = learning_rate(step, training.steps, config.optimizer, config.schedule)
        depth = self._depth_collector(step)
        result = self.engine.train_step(
            self.batches.micro_batches(self.position.consumed_samples, training.global_batch_size),
            training.global_batch_size // (training.micro_batch_size * self.runtime.data_size),
            rate,
            depth,
        )
        profile = depth.profile(step) if depth is not None else None
        consumed = self.position.consumed_samples + training.global_batch_size
        self.position = Position(step, consumed)
        self.tracker.step(self._record(result, rate, time.perf_counter() - started))
        if profile is not None:
            self.tracker.depth(profile)

    def _depth_collector(self, step: int) -> DepthCollector | None:
        """What gathers the step's depth profile: of step 1 and of every `depth_every`-th."""
        every = self.config.tracking.depth_every
        if every == 0 or (step != 1 and step % every):
            return None
        engine = self.engine
        return DepthCollector(self.config, self.runtime, engine.chunks, engine.optimizer)

    def _record(self, result: StepResult, rate: float, seconds: float) -> StepRecord:
        config, position = self.config, self.position
        seq_length = config.data.seq_length
        tokens_per_second = config.training.global_batch_size * seq_length / seconds
        flops = training_flops_per_token(config.model, seq_length, config.data.vocab_size)
        return StepRecord(
            step=position.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            consumed_samples=position.consumed_samples,
            consumed_tokens=position.consumed_samples * seq_length,
            tokens_per_second=tokens_per_second,
            tflops_per_device=tokens_per_second * flops / self.runtime.launch.world_size / 1e12,
            memory_gb=peak_memory_gb(self.runtime.device),
            seconds=seconds,
        )

    def _validate(self) -> None:
        self.validation_loss = self.engine.validate(self.validation, len(self.validation))
        position = self.position
        self.tracker.step(
            ValidationRecord(
                step=position.step,
                validation_loss=self.validation_loss,
                consumed_samples=position.consumed_samples,
                consumed_tokens=position.consumed_samples * self.config.data.seq_length,
            )
        )


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this rank in GB (1e9 bytes): allocated on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
