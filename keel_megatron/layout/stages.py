"""Assignment of a run's blocks to stages, and each stage's predicted time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keel_megatron.architecture.parameters import vector_parameters
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.layout.balance import StageShare, assign_blocks
from keel_megatron.layout.chunks import Chunk, Layout, from_counts
from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.devices import Device, this_device
from keel_megatron.layout.memory import GB, MemoryModel, StageMemory
from keel_megatron.layout.recomputation import Recomputation, most
from keel_megatron.layout.times import Load, StageTimes, UnitTimes, predicted_times
from keel_megatron.layout.work import Costs, Kernel

if TYPE_CHECKING:  # a plan starts without torch
    from keel_megatron.runtime.distributed import Runtime


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of a partition."""

    number: int
    chunks: tuple[Chunk, ...]
    recomputed: tuple[int, ...]
    """Number of fully recomputed blocks per chunk, the first ones of the chunk."""
    light: tuple[int, ...]
    """Number of lightly recomputed blocks per chunk, the next ones."""
    parameters: int
    """Parameters on one device of the stage."""
    memory: StageMemory
    load: Load
    """What it computes for a micro-batch."""
    times: StageTimes
    """Of one micro-batch through all chunks, with recomputation."""

    @property
    def blocks(self) -> int:
        """Number of blocks of all chunks."""
        return sum(chunk.blocks for chunk in self.chunks)

    @property
    def embedding(self) -> bool:
        """Whether the stage has the embedding."""
        return any(chunk.embedding for chunk in self.chunks)

    @property
    def head(self) -> bool:
        """Whether the stage has the final norm, the output layer and the loss."""
        return any(chunk.head for chunk in self.chunks)

    @property
    def forward_seconds(self) -> float:
        """Forward time of one micro-batch, seconds."""
        return self.times.longer.forward

    @property
    def backward_seconds(self) -> float:
        """Backward time of one micro-batch, with recomputation, seconds."""
        return self.times.longer.backward

    @property
    def seconds(self) -> float:
        """Forward and backward time of one micro-batch, seconds."""
        return self.times.longer.total


@dataclass(frozen=True)
class Partition:
    """The pipeline stages of a model; every rank computes the same from the configuration."""

    layout: Layout
    stages: tuple[Stage, ...]
    costs: Costs
    times: UnitTimes
    limit_bytes: float | None
    """Memory limit per device, bytes; None: no limit."""

    @property
    def worst_memory(self) -> Stage:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def slowest(self) -> Stage:
        """The stage that takes longest, which determines the speed."""
        return max(self.stages, key=lambda stage: stage.seconds)

    @property
    def fits(self) -> bool:
        """Whether a step fits in the memory limit on every stage."""
        return self.limit_bytes is None or self.worst_memory.memory.total <= self.limit_bytes

    def time_share(self, stage: Stage) -> float:
        """A stage's time relative to the slowest stage."""
        return stage.seconds / self.slowest.seconds

    @property
    def balance(self) -> float:
        """The slowest stage's time relative to the mean over stages (1: perfect balance)."""
        mean = sum(stage.seconds for stage in self.stages) / len(self.stages)
        return self.slowest.seconds / mean


def own_partition(config: RunConfig, runtime: Runtime) -> Partition:
    """The partition of the run of this process; the same on equal devices."""
    return partition(config, runtime.data_size, this_device(runtime.device))


def memory_limit(config: RunConfig, device: Device) -> float | None:
    """Bytes per device that a model may use: `parallel.memory_gb`, or the device's memory."""
    if config.parallel.memory_gb is not None:
        return config.parallel.memory_gb * GB
    if device.memory_gb is None:
        return None
    return (device.memory_gb - device.reserved_gb) * GB


def partition(
    config: RunConfig,
    data_parallel: int,
    device: Device,
    *,
    times: UnitTimes | None = None,
    layout: Layout | None = None,
    kernel: Kernel | None = None,
) -> Partition:
    """Assign blocks to stages, and predict each stage's time and memory.

    `parallel.layout` is used as given; otherwise the assignment minimises the slowest stage within
    the memory limit. If nothing fits, it is the fastest one without a limit (with all blocks
    recomputed under `recompute: auto`), and `Partition.fits` is false.

    Args:
        config: the run.
        data_parallel: number of replicas, which shard the optimizer state.
        device: device type of every stage.
        times: times of embedding, block and head; None: predicted from their costs.
        layout: use this layout instead of computing one.
        kernel: implementation of scaled add + norms; None: that of the device.
    """
    costs = model_costs(config, kernel or ("torch" if device.name == "cpu" else "triton"))
    times = times or predicted_times(costs, device)
    limit = memory_limit(config, device)
    memory = MemoryModel(config, costs, data_parallel)
    parallel = config.parallel
    if layout is None and parallel.layout is not None:
        layout = from_counts(parallel.layout, parallel.pipeline)
    if layout is None:
        shares = _chosen(config, memory, times, limit)
        order = range(parallel.virtual_pipeline)
        counts = [share.blocks[chunk] for chunk in order for share in shares]
        layout = from_counts(counts, parallel.pipeline)
        recomputed = [share.again for share in shares]
    else:
        recomputed = [
            _recomputed(memory, stage, _counts(layout, stage), limit)
            for stage in range(layout.pipeline)
        ]
    layout.check(config.model.blocks)
    stages = tuple(
        _stage(config, memory, times, layout, number, recomputed[number])
        for number in range(layout.pipeline)
    )
    return Partition(layout, stages, costs, times, limit)


def _chosen(
    config: RunConfig, memory: MemoryModel, times: UnitTimes, limit: float | None
) -> list[StageShare]:
    parallel = config.parallel
    sizes = (config.model.blocks, parallel.pipeline, parallel.virtual_pipeline)
    shares = assign_blocks(
        *sizes, times, lambda stage, blocks: memory.recomputation(stage, blocks, limit)
    )
    if shares is None:
        shares = assign_blocks(
            *sizes, times, lambda stage, blocks: _recomputed(memory, stage, blocks, limit)
        )
    assert shares is not None
    return shares


def _counts(layout: Layout, stage: int) -> tuple[int, ...]:
    return tuple(chunk.blocks for chunk in layout.stage(stage))


def _recomputed(memory: MemoryModel, stage: int, blocks: Any, limit: float | None) -> Recomputation:
    """Recomputed blocks of a stage; all of them if even that does not fit."""
    return memory.recomputation(stage, blocks, limit) or most(memory.config, blocks)


def _stage(
    config: RunConfig,
    memory: MemoryModel,
    times: UnitTimes,
    layout: Layout,
    number: int,
    again: Recomputation,
) -> Stage:
    chunks = layout.stage(number)
    blocks = [chunk.blocks for chunk in chunks]
    costs = memory.costs
    pieces = [(costs.block, sum(blocks))]
    pieces += [(costs.embedding, 1)] if chunks[0].embedding else []
    pieces += [(costs.head, 1)] if chunks[-1].head else []
    # A rule may give blocks different norms, so they are counted block by block.
    parameters = sum(cost.parameters * n for cost, n in pieces)
    parameters += sum(
        vector_parameters(config.model, range(chunk.first_block, chunk.first_block + chunk.blocks))
        for chunk in chunks
    )
    parameters += costs.head.vector_parameters if chunks[-1].head else 0
    load = Load(
        sum(blocks),
        chunks[0].embedding,
        chunks[-1].head,
        sum(again.full),
        sum(again.light),
        len(chunks),
    )
    return Stage(
        number=number,
        chunks=chunks,
        recomputed=again.full,
        light=again.light,
        parameters=parameters,
        memory=memory.stage(number, blocks, *again),
        load=load,
        times=times.of(load),
    )


def require_fit(partition: Partition, config: RunConfig) -> None:
    """Refuse a partition that needs more memory than `parallel.memory_gb`.

    Raises:
        UserError: names the stage, its memory, and settings that reduce it.
    """
    if config.parallel.memory_gb is None or partition.fits:
        return
    worst = partition.worst_memory
    ways = "raise parallel.pipeline or parallel.tensor, or lower training.micro_batch_size"
    if config.training.engine == "deepspeed":
        ways = (
            "raise deepspeed.zero_stage or parallel.tensor, set deepspeed.offload_optimizer or "
            "deepspeed.offload_parameters, or lower training.micro_batch_size"
        )
    if config.parallel.recompute == "none":
        ways = f"set parallel.recompute: auto, {ways}"
    raise UserError(
        f"parallel.memory_gb: stage {worst.number} needs {worst.memory.total / GB:.3g} GB, "
        f"{config.parallel.memory_gb:g} are allowed; {ways}"
    )
