"""The plan of a run: stages, simulated schedule, speed and memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from keel_megatron.architecture.flops import training_flops_per_token
from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.config.run import RunConfig
from keel_megatron.layout.devices import Device
from keel_megatron.layout.memory import GB
from keel_megatron.layout.stage_table import stage_rows
from keel_megatron.layout.stages import Partition, Stage, partition
from keel_megatron.layout.times import Load, Spread, UnitTimes, measured_spread, spread
from keel_megatron.layout.work import Kernel
from keel_megatron.planner.communication_volume import closing_seconds, link_seconds
from keel_megatron.planner.simulate import MemoryTrace, PipelineTimes, Timeline, simulate


@dataclass(frozen=True)
class Measured:
    """Measured times, in seconds."""

    times: UnitTimes
    update_block: float
    """Time per block of clipping, updating and zeroing gradients."""
    update_embedding: float
    """The same for the embedding, and for the head."""


@dataclass(frozen=True)
class Plan:
    """Prediction for a run on a number of devices."""

    config: RunConfig
    gpus: int
    device: Device
    partition: Partition
    times: PipelineTimes
    closing_seconds: float
    """Gradient reduction and optimizer update, seconds."""
    measured: bool
    """Whether the times are measured, not predicted."""

    @property
    def data_parallel(self) -> int:
        """Number of replicas."""
        return self.config.data_parallel_size(self.gpus)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per replica and step."""
        return self._micro_batches(self.config.training.global_batch_size)

    def _micro_batches(self, batch_size: int) -> int:
        return batch_size // (self.config.training.micro_batch_size * self.data_parallel)

    @cached_property
    def timeline(self) -> Timeline:
        """The simulated step."""
        return simulate(self.times, self.micro_batches)

    @property
    def step_seconds(self) -> float:
        """Time of an optimizer step, seconds."""
        return self.timeline.seconds + self.closing_seconds

    @cached_property
    def spread(self) -> Spread:
        """Range of the step's time, as factors of `step_seconds` (times.py)."""
        if self.measured:
            return measured_spread()
        return spread(self.partition.costs, self.device, self.partition.slowest.load)

    @property
    def step_range(self) -> tuple[float, float]:
        """Shortest and longest expected step, seconds."""
        return self.step_seconds * self.spread.low, self.step_seconds * self.spread.high

    @property
    def basis(self) -> str:
        """Origin of the times: measured or predicted."""
        if self.measured:
            return "measured on this machine"
        if self.device.name == "cpu":
            return "predicted, not measured; use --measure to measure on this machine"
        return "predicted, not measured on a GPU"

    @property
    def bubble(self) -> float:
        """Idle time of the slowest stage, relative to its work."""
        return self.timeline.bubble

    @property
    def run_tokens(self) -> int:
        """Tokens of all steps."""
        config = self.config
        return config.batch_sizes.samples_of(config.training.steps) * config.data.seq_length

    @cached_property
    def run_seconds(self) -> float:
        """Duration of all steps, seconds; those of a batch size ramp-up are shorter."""
        steps, sizes = self.config.training.steps, self.config.batch_sizes
        if not sizes.increments:
            return steps * self.step_seconds
        # The passes' time is linear in the micro-batches, with the filling of the pipeline.
        first = simulate(self.times, self._micro_batches(sizes.start)).seconds
        rate = (self.timeline.seconds - first) / (sizes.full - sizes.start)
        return sum(
            phase.steps * (first + (phase.size - sizes.start) * rate + self.closing_seconds)
            for phase in sizes.phases(steps)
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens per global batch."""
        return self.config.training.global_batch_size * self.config.data.seq_length

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole run."""
        return self.tokens_per_step / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs per second relative to the devices' peak (MFU)."""
        return self.mfu_at(self.tokens_per_second)

    def mfu_at(self, tokens_per_second: float) -> float:
        """MFU at a given speed."""
        config = self.config
        flops = training_flops_per_token(
            config.model, config.data.seq_length, config.data.vocab_size
        )
        return tokens_per_second * flops / (self.gpus * self.device.tflops * 1e12)

    @property
    def product_share(self) -> float:
        """Model FLOPs per second relative to the devices' largest measured product rate."""
        return self.mfu * self.device.tflops / self.device.measured_tflops

    @property
    def days(self) -> float:
        """Duration of all steps, days."""
        return self.run_seconds / 86400.0

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return parameter_count(self.config.model, self.config.data.vocab_size)

    @property
    def fits(self) -> bool:
        """Whether a step fits in memory on every stage."""
        return self.partition.fits

    def memory_traces(self) -> list[MemoryTrace]:
        """Memory of each stage, split into the constant part and activations per micro-batch."""
        return [_trace(self, stage) for stage in self.partition.stages]

    def as_object(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        parallel = self.config.parallel
        return {
            "name": self.config.training.name,
            "gpus": self.gpus,
            "device": self.device.name,
            "measured": self.measured,
            "parameters": self.parameters,
            "blocks": self.config.model.blocks,
            "sub_layers": self.config.model.sub_layers,
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "data_parallel": self.data_parallel,
            "micro_batches": self.micro_batches,
            "stages": stage_rows(self.partition),
            "slowest_stage": self.partition.slowest.number,
            "bound_by": self.partition.slowest.times.bound,
            "balance": self.partition.balance,
            "bubble": self.bubble,
            "step_seconds": self.step_seconds,
            "step_seconds_range": list(self.step_range),
            "basis": self.basis,
            "closing_seconds": self.closing_seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "share_of_measured_products": self.product_share,
            "tokens": self.run_tokens,
            "days": self.days,
            "memory_limit_gb": (self.partition.limit_bytes or 0.0) / GB or None,
            "fits": self.fits,
        }


def make_plan(
    config: RunConfig,
    gpus: int,
    device: Device,
    measured: Measured | None = None,
    kernel: Kernel | None = None,
) -> Plan:
    """Plan a valid run.

    Args:
        config: the run, valid for `gpus` processes.
        gpus: number of devices, one per process.
        device: the device type.
        measured: measured times to use instead of predicted ones.
        kernel: implementation of scaled add + norms; None: that of the device.
    """
    replicas = config.data_parallel_size(gpus)
    times = measured.times if measured else None
    parts = partition(config, replicas, device, times=times, kernel=kernel)
    links = link_seconds(config, device, replicas)
    closing = closing_seconds(
        config, device, replicas, parts, _updates(config, replicas, parts, measured)
    )
    return Plan(config, gpus, device, parts, _pass_times(parts, links), closing, bool(measured))


def _pass_times(parts: Partition, links: tuple[float, ...]) -> PipelineTimes:
    """Forward and backward time of each chunk, in model order, seconds."""
    forward, backward = [], []
    pipeline, times = parts.layout.pipeline, parts.times
    for number, chunk in enumerate(parts.layout.chunks):
        stage, own = parts.stages[number % pipeline], number // pipeline
        load = Load(
            chunk.blocks,
            chunk.embedding,
            chunk.head,
            stage.recomputed[own],
            stage.light[own],
        )
        # Chunks of a stage share its device and its host.
        one = times.of(load).of(stage.times.bound)
        forward.append(one.forward)
        backward.append(one.backward)
    return PipelineTimes(pipeline, tuple(forward), tuple(backward), links)


def _updates(
    config: RunConfig, replicas: int, parts: Partition, measured: Measured | None
) -> list[float] | None:
    """Measured update time of each stage; a replica updates its share of what is sharded."""
    if measured is None:
        return None
    sharded = config.parallel.distributed_optimizer
    ends = replicas if sharded else 1
    blocks = replicas if sharded or config.optimizer.name == "muon" else 1
    return [
        stage.blocks * measured.update_block / blocks
        + (stage.embedding + stage.head) * measured.update_embedding / ends
        for stage in parts.stages
    ]


def _trace(plan: Plan, stage: Stage) -> MemoryTrace:
    costs, memory = plan.partition.costs, stage.memory
    chunks = []
    for chunk, *again in zip(stage.chunks, stage.recomputed, stage.light, strict=True):
        kept = costs.block.kept_bytes(chunk.blocks, *again)
        kept += costs.embedding.activation_bytes if chunk.embedding else 0
        if chunk.head and memory.logits:
            kept += costs.head.activation_bytes + costs.head.logits_bytes
        chunks.append(float(kept))
    logits = costs.head.logits_bytes if memory.logits else 0
    return MemoryTrace(float(memory.total - memory.activations - logits), tuple(chunks))
