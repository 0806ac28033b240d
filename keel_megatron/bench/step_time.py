"""Measures the time of training steps by part, for one or several configurations."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keel_megatron.architecture.flops import training_flops_per_token
from keel_megatron.bench.timers import PASSES, PartTimers
from keel_megatron.checkpoint.saver import Saver
from keel_megatron.checkpoint.state import Position
from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch, random_batch
from keel_megatron.data.dataset import Dataset, open_dataset
from keel_megatron.engines.build import build_engine
from keel_megatron.errors import UserError
from keel_megatron.layout.stages import own_partition
from keel_megatron.mlflow_delivery.reporting import open_progress, open_tracker
from keel_megatron.model.attention_kernel import describe_attention, prefer_attention
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.tracking.tracker import Tracker
from keel_megatron.training.ready import open_batches
from keel_megatron.training.step_record import peak_memory_gb, step_record

PARTS = (*PASSES, "optimizer", "data", "logging")
"""Parts of a step; their times add up to that of the step."""


@dataclass(frozen=True)
class PredictedPasses:
    """Predicted time of a step's micro-batches on the slowest stage, seconds."""

    device: float
    host: float
    bound: str
    """Which of both is longer: `device` or `host`."""

    @classmethod
    def of(cls, config: RunConfig, runtime: Runtime, count: int) -> PredictedPasses | None:
        """The prediction for this device and so many micro-batches; None on a CPU."""
        times = own_partition(config, runtime).slowest.times
        if not times.host.total:
            return None
        return cls(times.device.total * count, times.host.total * count, times.bound)


@dataclass
class Samples:
    """Times of the steps of one configuration on one rank, seconds."""

    name: str
    config: RunConfig
    steps: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})
    host: list[float] = field(default_factory=list)
    """Host time of the passes, until their last kernel is launched; on a CPU, their time."""
    passes: list[float] = field(default_factory=list)
    """Device time of the passes: all parts of a step but the optimizer, data and logging."""
    losses: list[float] = field(default_factory=list)
    peak_memory_gb: float = 0.0
    on_host: bool = True
    """Whether the device is the CPU."""
    predicted: PredictedPasses | None = None
    """The plan's prediction; None on a CPU."""
    attention: str = ""
    """The attention kernel's name."""
    checkpoint_stall: float | None = None
    """Time for which a save blocked training, seconds; None without checkpoints."""

    @property
    def tokens(self) -> int:
        """Tokens per step, of all replicas."""
        return self.config.training.global_batch_size * self.config.data.seq_length

    @property
    def flops(self) -> float:
        """Model FLOPs per step, of all devices (architecture/flops.py)."""
        config = self.config
        return self.tokens * training_flops_per_token(
            config.model, config.data.seq_length, config.data.vocab_size
        )


def time_steps(
    configs: dict[str, RunConfig],
    runtime: Runtime,
    *,
    warmup: int,
    steps: int,
    datasets: Mapping[str, Path] | None,
    say: Callable[[str], None],
    profile: Path | None = None,
) -> list[Samples]:
    """Train all configurations, alternating after each step.

    The runs' folders are temporary. With several nodes, checkpoints need a shared folder, in
    `training.runs_dir`.

    Args:
        configs: configurations by name, with the same layout.
        runtime: this rank.
        warmup: untimed steps per configuration.
        steps: timed steps per configuration.
        datasets: dataset folder of each configuration; None: random tokens.
        say: called with progress messages on rank 0.
        profile: file to which rank 0 writes a torch trace of a further step of the first
            configuration.

    Raises:
        UserError: `training.runs_dir` is needed and cannot be written.
    """
    with ExitStack() as stack:
        folder = runtime.from_main(lambda: _temporary(configs, runtime, stack))
        runs = [
            stack.enter_context(
                _Run.opened(
                    name, config, runtime, folder, None if datasets is None else datasets[name]
                )
            )
            for name, config in configs.items()
        ]
        for number in range(warmup + steps):
            for run in runs:
                run.step(counted=number >= warmup)
            if runtime.is_main:
                shown = ", ".join(f"{run.samples.name} {run.last * 1e3:.1f} ms" for run in runs)
                say(f"step {number + 1}/{warmup + steps}: {shown}")
        if profile is not None:
            _trace(runs[0], profile)
        for run in runs:
            run.save()
            run.samples.peak_memory_gb = peak_memory_gb(runtime.device)
        runtime.barrier()  # before the folder goes
        return [run.samples for run in runs]


def _temporary(configs: dict[str, RunConfig], runtime: Runtime, stack: ExitStack) -> Path:
    """A temporary folder, removed at the end of the stack."""
    saving = [config for config in configs.values() if config.checkpoint.every]
    shared = saving[0].training.runs_dir if saving and len(set(runtime.hosts)) > 1 else None
    try:
        if shared is not None:
            shared.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=".keel-bench-", dir=shared)
    except OSError as error:
        raise UserError(
            f"training.runs_dir: checkpoints of several nodes need this folder, and {shared} "
            f"cannot be written: {error.strerror}; or set checkpoint.every=0"
        ) from error
    return Path(stack.enter_context(made)).resolve()


class _Run:
    """A run of one configuration."""

    def __init__(
        self,
        name: str,
        config: RunConfig,
        runtime: Runtime,
        tracker: Tracker,
        dataset: Path | None,
    ) -> None:
        self.samples = Samples(name, config)
        self.last = float("nan")
        self.runtime, self._tracker = runtime, tracker
        self._timers = PartTimers(runtime.device)
        self.samples.on_host = runtime.device.type == "cpu"
        self.samples.attention = describe_attention(config, runtime.device)
        self._data: Dataset | None = None
        count = config.training.global_batch_size
        count //= config.training.micro_batch_size * runtime.data_size
        self.samples.predicted = PredictedPasses.of(config, runtime, count)
        if dataset is None:
            drawn = [random_batch(config, seed) for seed in range(count)]
            self._batches: Callable[[int], list[Batch]] = lambda _consumed: drawn
        else:
            self._data = runtime.from_main(lambda: open_dataset(dataset, config.data))
            source = open_batches(config, runtime, self._data).train
            size = config.training.global_batch_size
            self._batches = lambda consumed: list(source.micro_batches(consumed, size))
        self._engine = build_engine(config, runtime, build_model(config, runtime))
        for chunk in self._engine.chunks:
            megatron_config: Any = chunk.config
            megatron_config.timers = self._timers
        self._position = Position()

    @classmethod
    @contextmanager
    def opened(
        cls, name: str, config: RunConfig, runtime: Runtime, folder: Path, dataset: Path | None
    ) -> Iterator[_Run]:
        """Open the run for the duration of the block."""
        training = config.training.model_copy(update={"runs_dir": folder / f"run-{name}"})
        # Metrics are part of a step, but a benchmark must not report to a team's server.
        tracking = config.tracking.model_copy(update={"uri": None})
        config = config.model_copy(update={"training": training, "tracking": tracking})
        with (
            Path(os.devnull).open("w") as nowhere,
            open_tracker(config, runtime.rank, None, open_progress(config, nowhere)) as tracker,
        ):
            yield cls(name, config, runtime, tracker, dataset)

    def step(self, *, counted: bool) -> None:
        """Train one step, and record its times if counted."""
        config, position = self.samples.config, self._position
        rate = config.optimizer.learning_rate
        prefer_attention(config, self.runtime.device)  # the other variants' may differ
        self.runtime.barrier()
        self._timers.take()
        begin = self._now()
        batches = self._batches(position.consumed_samples)
        read = self._now()
        result = self._engine.train_step(batches, len(batches), rate)
        trained = self._now()
        batch_size = config.training.global_batch_size
        self._position = Position(position.step + 1, position.consumed_samples + batch_size)
        seconds = trained - begin
        self._tracker.step(
            step_record(config, self.runtime, self._position, result, rate, seconds, batch_size)
        )
        end = self._now()
        self.last = end - begin
        if not counted:
            return
        self.samples.steps.append(end - begin)
        self.samples.losses.append(result.loss)
        found = self._timers.take()
        passes = found.pop("passes")
        self.samples.host.append(self._timers.host_seconds)
        self.samples.passes.append(passes)
        found["optimizer"] = trained - read - passes
        found |= {"data": read - begin, "logging": end - trained}
        for part, values in self.samples.parts.items():
            values.append(found[part])

    def save(self) -> None:
        """Save a checkpoint, if the run saves any, and time how long it blocks training."""
        config = self.samples.config
        if config.checkpoint.every == 0:
            return
        identity = self._data.identity() if self._data is not None else {}
        saver = Saver(config, self.runtime, self._tracker, data=identity)
        saver.save(self._engine.state, self._position, {})
        saver.finish()
        if self.runtime.is_main:
            records = read_metrics(config.training.folder / "metrics.jsonl")
            stalls = [r["checkpoint_stall_seconds"] for r in records if "checkpoint_bytes" in r]
            self.samples.checkpoint_stall = stalls[-1] if stalls else None

    def _now(self) -> float:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
        return time.perf_counter()


def _trace(run: _Run, path: Path) -> None:
    """A torch trace of one step, in Chrome's format (chrome://tracing, perfetto)."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        run.step(counted=False)
    if run.runtime.is_main:
        trace.export_chrome_trace(str(path))


@dataclass(frozen=True)
class Roofline:
    """Measured peak rates of this device."""

    tflops: float
    """Rate of a large matrix product in the run's compute type, 1e12 FLOP/s."""
    bandwidth_gb: float
    """Rate of a large copy, read and written, 1e9 bytes/s."""


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure a large matrix product and a large copy."""
    cuda = device.type == "cuda"
    n, size = (8192, 2**31) if cuda else (1024, 2**27)
    a = torch.randn(n, n, device=device).to(dtype)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    product = torch.empty_like(a)

    def seconds(call: Callable[[], Tensor]) -> float:
        """The shortest time of several calls, seconds."""
        times = []
        for _ in range(7):
            if cuda:
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        return min(times)

    return Roofline(
        2.0 * n**3 / seconds(lambda: torch.mm(a, a, out=product)) / 1e12,
        2.0 * size / seconds(lambda: target.copy_(source)) / 1e9,
    )
