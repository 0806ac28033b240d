"""One rank of a job that does not run: its model, a step, a depth profile, a validation, a save."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from keel_megatron.config.run import RunConfig
from keel_megatron.layout.devices import Device
from keel_megatron.layout.stages import Partition, partition
from keel_megatron.planner.trace import device as devices
from keel_megatron.planner.trace import stand_ins
from keel_megatron.planner.trace.allocator import CachingAllocator
from keel_megatron.planner.trace.device import CUDA
from keel_megatron.planner.trace.result import PARTS, RankTrace, curve_of, merged, part_of
from keel_megatron.planner.trace.tracker import Tracker, group_names

_GPUS = {
    "a100": (108, (8, 0)),
    "h100": (132, (9, 0)),
    "h200": (132, (9, 0)),
    "b200": (148, (10, 0)),
}
"""Streaming multiprocessors and compute capability."""
_BACKEND = "absent"


@dataclass(frozen=True)
class Request:
    """What to trace."""

    config: RunConfig
    gpus: int
    device: Device
    stage: int
    tensor_rank: int = 0
    micro_batches: int | None = None
    """Of a step; None = 2 x pipeline stages, or as many as the run has."""
    strict: bool = False
    """With FakeTensors, which find operators that mix devices (trace/device.py)."""
    depth: bool = True
    """Also a step with a depth profile."""
    validation: bool = True
    save: bool = True

    @property
    def replicas(self) -> int:
        """Data-parallel replicas."""
        return self.config.data_parallel_size(self.gpus)

    @property
    def all_micro_batches(self) -> int:
        """Of a replica and a step of the run."""
        training = self.config.training
        return training.global_batch_size // (training.micro_batch_size * self.replicas)

    @property
    def count(self) -> int:
        """Micro-batches that are traced: the pipeline is full with them."""
        wanted = self.micro_batches or 2 * self.config.parallel.pipeline
        return min(wanted, self.all_micro_batches)


def trace_rank(request: Request) -> RankTrace:
    """Trace a rank; once a process, which is of no other use afterwards."""
    started = time.perf_counter()
    tracker = _install(request)
    runtime = _start_groups(request)
    tracker.groups = group_names()
    parts = partition(request.config, request.replicas, request.device)
    with ExitStack() as stack:
        if request.strict:
            from torch._subclasses import FakeTensorMode

            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(tracker)
        engine = _build(request, runtime, parts, tracker)
        _train(request, engine, tracker)
        if request.save:
            _save(engine, tracker)
    planned = parts.stages[request.stage].memory.total
    return _result(request, tracker, planned, time.perf_counter() - started)


def _install(request: Request) -> Tracker:
    """Have this process take CUDA for there."""
    from keel_megatron import compat

    processors, capability = _GPUS.get(request.device.name, _GPUS["h200"])
    tracker = Tracker(strict=request.strict)
    memory = int((request.device.memory_gb or 80.0) * 1e9)
    gpu = devices.Gpu(request.device.name, memory, processors, capability)
    compat.install()
    import megatron.core.optimizer  # noqa: F401 - imports look at the real torch.cuda

    devices.install(gpu, tracker.wait, tracker.device_of, strict=request.strict)
    which = "cudnn" if capability >= (9, 0) else "flash"
    stand_ins.install(tracker.launch, which)
    torch.autograd.set_multithreading_enabled(False)  # the tracker belongs to this thread
    return tracker


def _start_groups(request: Request) -> Any:
    """Megatron-core's process groups of the whole job, seen from one rank; its runtime."""
    from torch.testing._internal.distributed.fake_pg import FakeStore, _create_fake_pg

    from keel_megatron.runtime.device import Launch
    from keel_megatron.runtime.distributed import model_parallel
    from keel_megatron.runtime.seeds import seed_dropout

    parallel, backend = request.config.parallel, _BACKEND
    # Megatron-core's order of ranks: tensor, data, pipeline.
    rank = request.tensor_rank + request.stage * parallel.tensor * request.replicas
    make: Any = _create_fake_pg
    dist.Backend.register_backend(backend, make, extended_api=True, devices=["cpu", "cuda", "meta"])
    dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=request.gpus)
    plain: Any = dist.new_group
    distributed: Any = dist
    distributed.all_gather_object = _all_say_the_same
    distributed.new_group = lambda *args, **kwargs: plain(*args, **{**kwargs, "backend": backend})
    launch = Launch(rank, request.gpus, rank % 8, 8)
    runtime = model_parallel(parallel, launch, CUDA, 1)
    assert (runtime.pipeline_rank, runtime.tensor_rank) == (request.stage, request.tensor_rank)
    seed_dropout(request.config.training.seed, runtime.pipeline_rank, runtime.data_rank)
    return runtime


def _all_say_the_same(found: list[Any], value: Any, group: Any = None) -> None:  # noqa: ARG001
    found[:] = [value] * len(found)


def _build(request: Request, runtime: Any, parts: Partition, tracker: Tracker) -> Any:
    from keel_megatron.engines.build import build_engine
    from keel_megatron.model.language_model import build_model

    with torch.device(CUDA):
        chunks = build_model(request.config, runtime, parts)
    tracker.enter("states")
    engine: Any = build_engine(request.config, runtime, chunks)
    # Phases within a step, by what Megatron-core and the engine call.
    config: Any = engine.chunks[0].config
    config.finalize_model_grads_func = _in_phase(
        tracker, "gradients", config.finalize_model_grads_func
    )
    engine.optimizer.prepare_grads = _in_phase(tracker, "update", engine.optimizer.prepare_grads)
    engine._result = _in_phase(tracker, "update", engine._result)
    engine._update = _in_phase(tracker, "update", engine._update)
    return engine


def _in_phase(tracker: Tracker, name: str, function: Any) -> Any:
    """The function, counted as a phase; a prefix of the phase around it stays."""

    def call(*args: Any, **kwargs: Any) -> Any:
        outer = tracker.name.partition(":")[0]
        with tracker.within(name if outer == "step" else f"{outer}: {name}"):
            return function(*args, **kwargs)

    return call


def _batches(request: Request) -> list[Any]:
    """All micro-batches of a step of the run, with what the stage uses of them."""
    from keel_megatron.data.batches import Batch

    config, stage = request.config, request.stage
    sequences = config.training.micro_batch_size
    zeros = partial(torch.zeros, (sequences, config.data.seq_length), device="cpu")
    tokens = zeros(dtype=torch.long)
    batch = Batch(tokens, tokens)
    if config.data.has_loss_mask:
        batch = replace(batch, loss_mask=zeros())
    if config.data.document_masks:  # two a sequence
        numbers = zeros(dtype=torch.int32)
        borders = torch.zeros(2 * sequences + 1, dtype=torch.int32, device="cpu")
        longest = config.data.seq_length
        batch = replace(batch, documents=numbers, borders=borders, longest=longest)
    if config.model.stream == "bf16_stochastic":
        numbers = torch.zeros(sequences, dtype=torch.long, device="cpu")
        batch = replace(batch, sequences=numbers)
    used = batch.only(tokens=stage == 0, labels=stage == config.parallel.pipeline - 1)
    return [used] * request.all_micro_batches


def _train(request: Request, engine: Any, tracker: Tracker) -> None:
    """A step, a step with a depth profile, a validation."""
    from keel_megatron.data.batches import Batch
    from keel_megatron.depth.collector import DepthCollector

    rate, count = request.config.optimizer.learning_rate, request.count
    batches = _batches(request)
    Batch.to = _in_phase(tracker, "batches", Batch.to)  # type: ignore[method-assign]
    tracker.enter("step")
    engine.train_step(batches, count, rate)
    if request.depth:
        tracker.enter("depth profile")
        depth = DepthCollector(engine)
        engine.train_step(batches, count, rate, depth=depth)
        depth.profile(1)
        del depth
    if request.validation:
        tracker.enter("validation")
        engine.validate(batches, count)


def _save(engine: Any, tracker: Tracker) -> None:
    """What `checkpoint.state.snapshot` takes before training goes on: copies in host memory."""
    tracker.enter("save")
    tracker.host_factories = True
    engine.state.to_save(copy=True)


def _result(request: Request, tracker: Tracker, planned: int, seconds: float) -> RankTrace:
    reserved = _reserved(tracker)
    phases = {
        part: [found for name, found in tracker.phases.items() if part_of(name) == part]
        for part in PARTS
    }
    curve, marks = curve_of(tracker.events, tracker.marks)
    return RankTrace(
        stage=request.stage,
        tensor_rank=request.tensor_rank,
        micro_batches=request.count,
        all_micro_batches=request.all_micro_batches,
        parts={name: merged(found, reserved[name]) for name, found in phases.items() if found},
        passes=merged([tracker.phases["step"]], reserved["step"]),
        planned=planned,
        curve=curve,
        marks=marks,
        seconds=seconds,
    )


def _reserved(tracker: Tracker) -> dict[str, tuple[int, int]]:
    """What the allocator has reserved at the end of every part, without and with expanding."""
    allocators = CachingAllocator(), CachingAllocator(expandable=True)
    ends = [at for at, _name in tracker.marks[1:]] + [len(tracker.events)]
    found: dict[str, tuple[int, int]] = {}
    start = 0
    for (_at, name), end in zip(tracker.marks, ends, strict=True):
        for size, key in tracker.events[start:end]:
            for allocator in allocators:
                if size > 0:
                    allocator.malloc(key, size)
                else:
                    allocator.free(key)
        found[part_of(name)] = allocators[0].reserved, allocators[1].reserved
        start = end
    return found
