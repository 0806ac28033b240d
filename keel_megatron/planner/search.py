"""Search for the fastest layout of a model on a number of devices.

A bound that takes microseconds ranks thousands of layouts; the best of them are balanced and
simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from keel_megatron.config.checks import problems
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.layout.costs import model_costs
from keel_megatron.layout.devices import Device
from keel_megatron.layout.memory import MemoryModel
from keel_megatron.layout.muon import muon_load
from keel_megatron.layout.stages import memory_limit
from keel_megatron.layout.times import Times, UnitTimes, predicted_times
from keel_megatron.layout.work import Costs, Kernel
from keel_megatron.planner.communication_volume import link_seconds, stage_closing_seconds
from keel_megatron.planner.plan import Plan, make_plan
from keel_megatron.planner.simulate import PipelineTimes, simulate

BEST = 10
_SIMULATED = 16
_PASSES = 24_000
_VIRTUAL = (1, 2, 3, 4, 6, 8, 12, 16)
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, with its prediction."""

    plan: Plan

    @cached_property
    def pipeline_seconds(self) -> float:
        """Time of a step's passes, seconds; a long step is simulated in part and extrapolated."""
        plan = self.plan
        return _pipeline_seconds(plan.times, plan.micro_batches)

    @property
    def step_seconds(self) -> float:
        """Time of an optimizer step, seconds."""
        return self.pipeline_seconds + self.plan.closing_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole run."""
        return self.plan.tokens_per_step / self.step_seconds

    @property
    def work_seconds(self) -> float:
        """Computation time of the slowest stage per step, seconds."""
        return self.plan.partition.slowest.seconds * self.plan.micro_batches

    @cached_property
    def message_seconds(self) -> float:
        """Time that messages between stages add to a step, seconds."""
        plan = self.plan
        silent = replace(plan.times, link=(0.0,) * plan.times.pipeline)
        return self.pipeline_seconds - _pipeline_seconds(silent, plan.micro_batches)

    @property
    def bubble(self) -> float:
        """Idle time of the slowest stage, relative to its work."""
        return max(0.0, self.pipeline_seconds / self.work_seconds - 1.0)

    @property
    def recompute(self) -> str:
        """Recomputation: none, light or full for all blocks, or the numbers of blocks."""
        stages = self.plan.partition.stages
        blocks = sum(stage.blocks for stage in stages)
        full = sum(sum(stage.recomputed) for stage in stages)
        light = sum(sum(stage.light) for stage in stages)
        for count, word in ((full, "full"), (light, "light")):
            if count == blocks:
                return word
        counts = [f"{full} full"] * (full > 0) + [f"{light} light"] * (light > 0)
        return ", ".join(counts) or "none"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of this layout, with YAML values."""
        parallel, training = self.plan.config.parallel, self.plan.config.training
        return {
            "parallel.tensor": parallel.tensor,
            "parallel.sequence": str(parallel.sequence).lower(),
            "parallel.pipeline": parallel.pipeline,
            "parallel.virtual_pipeline": parallel.virtual_pipeline,
            "parallel.layout": "null",
            "parallel.recompute": parallel.recompute,
            "training.micro_batch_size": training.micro_batch_size,
        }

    @property
    def overrides(self) -> list[str]:
        """The settings as overrides for `keel train`."""
        return [f"{path}={value}" for path, value in self.settings.items()]


@dataclass(frozen=True)
class Found:
    """Result of a search, best layout first."""

    best: tuple[Candidate, ...]
    tried: int
    fitting: int


def search(config: RunConfig, gpus: int, device: Device) -> Found:
    """Try TP x PP x VPP x DP x micro-batch x recompute on up to `gpus` devices.

    A layout may leave devices idle, if the batch does not divide among all of them.

    Raises:
        UserError: nothing fits.
    """
    tried = 0
    ranked: list[tuple[float, int, _Layout]] = []
    limit = memory_limit(config, device)
    for layout in _layouts(config, gpus, device):
        tried += 1
        bound = _Bound(layout, device, limit).step_seconds
        if bound is not None:
            ranked.append((bound, len(ranked), layout))
    ranked.sort(key=lambda one: one[:2])
    candidates: list[Candidate] = []
    for bound, _number, layout in ranked:
        # The bounds are sorted: after one above the tenth best result, nothing better follows.
        if (
            len(candidates) >= BEST
            and bound >= sorted(c.step_seconds for c in candidates)[BEST - 1]
        ):
            break
        if len(candidates) >= _SIMULATED:
            break
        plan = make_plan(layout.config, layout.gpus, device)
        if plan.fits:
            candidates.append(Candidate(plan))
    if not candidates:
        raise UserError(_nothing_fits(config, gpus, device, tried))
    candidates.sort(key=lambda candidate: candidate.step_seconds)
    return Found(tuple(candidates[:BEST]), tried, len(ranked))


def _nothing_fits(config: RunConfig, gpus: int, device: Device, tried: int) -> str:
    if not tried:
        return (
            f"--search: no layout of {config.model.blocks} blocks and "
            f"training.global_batch_size = {config.training.global_batch_size} is valid on {gpus} "
            "devices; other sizes of model.* or training.* would allow one"
        )
    return (
        f"--search: none of {tried} layouts on up to {gpus} {device.name} fits into "
        f"{(memory_limit(config, device) or 0.0) / 1e9:.4g} GB a device; raise --gpus, or lower "
        "data.seq_length or the model's size"
    )


@dataclass(frozen=True)
class _Layout:
    """A layout to evaluate."""

    config: RunConfig
    gpus: int
    costs: Costs
    times: UnitTimes


def _layouts(config: RunConfig, gpus: int, device: Device) -> Iterator[_Layout]:
    """All layouts that the configuration's checks accept, with recompute: auto."""
    batch = config.batch_sizes.unit
    tensors = [size for size in (1, 2, 4, 8) if size <= min(gpus, device.devices_per_node)]
    kernel: Kernel = "torch" if device.name == "cpu" else "triton"
    for tensor in tensors:
        for micro_batch in _MICRO_BATCHES:
            if batch % micro_batch:
                continue
            base = _with(config, tensor, 1, 1, micro_batch)
            if any(True for _problem in problems(base)):
                continue
            costs = model_costs(base, kernel)
            times = predicted_times(costs, device)
            stages = min(config.model.blocks + 2, gpus // tensor)
            for pipeline in _pipelines(1 if _on_deepspeed(config) else stages):
                for virtual in _VIRTUAL if pipeline > 1 else (1,):
                    if pipeline * virtual - 2 > config.model.blocks:
                        break
                    group = pipeline if virtual > 1 else 1
                    replicas = _replicas(batch // micro_batch, group, gpus // (tensor * pipeline))
                    if replicas == 0:
                        continue
                    layout = _with(config, tensor, pipeline, virtual, micro_batch)
                    yield _Layout(layout, tensor * pipeline * replicas, costs, times)


def _on_deepspeed(config: RunConfig) -> bool:
    """Whether only one stage without sequence parallelism is supported."""
    return config.training.engine == "deepspeed"


def _pipelines(most: int) -> Iterator[int]:
    """Stage counts to try: all small ones, then in growing steps."""
    for size in range(1, most + 1):
        step = 1 if size <= 16 else 4 if size <= 64 else 16
        if size % step == 0 or size == most:
            yield size


def _replicas(micro_batches: int, group: int, most: int) -> int:
    """The largest number of replicas that divides the micro-batches, in groups; 0 if none."""
    if micro_batches % group:
        return 0
    groups = micro_batches // group
    return next((size for size in range(min(most, groups), 0, -1) if groups % size == 0), 0)


def _with(
    config: RunConfig, tensor: int, pipeline: int, virtual: int, micro_batch: int
) -> RunConfig:
    parallel = config.parallel.model_copy(
        update={
            "tensor": tensor,
            "sequence": tensor > 1 and not _on_deepspeed(config),
            "pipeline": pipeline,
            "virtual_pipeline": virtual,
            "layout": None,
            "recompute": "auto",
        }
    )
    training = config.training.model_copy(update={"micro_batch_size": micro_batch})
    return config.model_copy(update={"parallel": parallel, "training": training})


class _Bound:
    """Closed-form bound of a layout's step: a few percent below the simulated time."""

    def __init__(self, layout: _Layout, device: Device, limit: float | None) -> None:
        self.layout, self.device, self.limit = layout, device, limit
        self.config, self.times = layout.config, layout.times
        self.parallel = layout.config.parallel
        self.replicas = layout.config.data_parallel_size(layout.gpus)
        self.memory = MemoryModel(layout.config, layout.costs, self.replicas)

    @property
    def step_seconds(self) -> float | None:
        """Time in seconds, or None if the layout does not fit even with full recomputation."""
        blocks = self.config.model.blocks
        pipeline, virtual = self.parallel.pipeline, self.parallel.virtual_pipeline
        times, unit = self.times, self.times.block
        total = blocks * unit.total + times.embedding.total + times.head.total
        if times.host is not None:
            total = max(total, blocks * times.host.block.total)
        slowest = max(total / pipeline, times.head.total, times.embedding.total)
        again = self._recomputing(0, blocks // pipeline)
        last = self._recomputing(pipeline - 1, self._beside_the_head(slowest))
        if again is None or last is None:
            return None
        # Micro-batches in flight, and so recomputed blocks, decrease linearly with the stage.
        extra = 0.5 * (again + last)
        slowest, total = slowest + extra, total + pipeline * extra
        micro_batches = self.memory.micro_batches
        links = link_seconds(self.config, self.device, self.replicas)
        messages = 2 * sum(links[:-1]) * (1 if virtual == 1 else virtual)
        if virtual == 1 and pipeline > 1:
            # Each inner stage communicates with both neighbours for every micro-batch.
            messages += micro_batches * max(links[:-1]) * min(pipeline - 1, 2)
        busy = micro_batches * slowest + (total - slowest) / virtual
        return busy + messages + self._closing(blocks)

    def _beside_the_head(self, slowest: float) -> int:
        left = slowest - self.times.head.total
        return max(0, min(int(left / self.times.block.total), self.config.model.blocks))

    def _recomputing(self, stage: int, blocks: int) -> float | None:
        """Seconds of a stage's recomputation; None: it does not fit."""
        virtual = self.parallel.virtual_pipeline
        base, more = divmod(blocks, virtual)
        counts = [base + (chunk < more) for chunk in range(virtual)]
        found = self.memory.recomputation(stage, counts, self.limit)
        return None if found is None else self.times.recomputing(sum(found.full), sum(found.light))

    def _closing(self, blocks: int) -> float:
        costs, pipeline = self.layout.costs, self.parallel.pipeline
        muon = muon_load(self.config, blocks // pipeline, self.replicas, costs.muon_bytes)
        block = costs.block.vector_parameters + (0 if muon.buffer else costs.block.parameters)
        parameters = max(
            (blocks * block + costs.embedding.parameters + costs.head.parameters) // pipeline,
            costs.embedding.parameters,
        )
        chunks = pipeline * self.parallel.virtual_pipeline
        unit = self.times.block
        return stage_closing_seconds(
            self.config,
            self.device,
            self.replicas,
            parameters,
            muon,
            passes=Times(blocks * unit.forward / chunks, blocks * unit.backward / chunks),
        )


def _pipeline_seconds(times: PipelineTimes, micro_batches: int) -> float:
    """Simulated time of a step's passes; a long step is extrapolated from its first part."""
    pipeline = times.pipeline
    groups = max(4, _PASSES // (2 * len(times.forward) * pipeline))
    if micro_batches <= groups * pipeline:
        return simulate(times, micro_batches).seconds
    followed = groups * pipeline + micro_batches % pipeline
    before = followed - groups // 2 * pipeline
    seconds, earlier = (simulate(times, count).seconds for count in (followed, before))
    rate = (seconds - earlier) / (followed - before)
    return seconds + (micro_batches - followed) * rate
