"""What a grid will cost: each run's start-up and steps, measured here or predicted for a GPU.

The times come from the planner, as `keel plan --measure` has them, in a process of its own:
measuring occupies a device and sets threads. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.config.load import flatten
from keel_megatron.config.reading import read_small
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole
from keel_megatron.runtime.interpreter import environment, python
from keel_megatron.runtime.tables import count, table_lines
from keel_megatron.studies.grid import Grid, GridRun
from keel_megatron.studies.results import has_result
from keel_megatron.tracking.progress import duration

FILE = "cost.json"
"""Measured times in the study's folder, so that they are measured once."""
MODULE = "keel_megatron.planner.step_times"
_FORWARD_SHARE = 1 / 3
"""Of a step's time: a validation has no backward pass."""
_NO_SHAPE = (
    "model.alpha",
    "model.init_std",
    "training.name",
    "training.runs_dir",
    "training.seed",
    "training.steps",
    "training.validat",
    "optimizer.",
    "schedule.",
    "checkpoint.",
    "guard.",
    "tracking.",
    "data.cache_dir",
    "data.text",
    "data.sources",
    "data.dataset",
)
"""Settings that do not change the time of a step."""


@dataclass(frozen=True)
class Times:
    """Times of a shape."""

    startup_seconds: float
    """From the start of a run's process to its model; 0.0 if it was not measured."""
    step_seconds: float

    def seconds(self, run: GridRun) -> float:
        """Predicted duration of a run."""
        training = run.config.training
        every = training.validate_every
        validations = 1 + (training.steps // every if every else 0)
        batches = training.validation_sequences / training.global_batch_size
        # Of the full batch; a smaller one of a ramp-up counts by its sequences.
        full = run.config.batch_sizes.samples_of(training.steps) / training.global_batch_size
        steps = full + validations * batches * _FORWARD_SHARE
        return self.startup_seconds + steps * self.step_seconds


@dataclass(frozen=True)
class Cost:
    """Times of the runs of a grid."""

    grid: Grid
    parallel: int
    gpu: str | None
    """The device type they are predicted for; None: measured on this machine."""
    times: Mapping[str, Times]
    """By run; a run whose time is unknown is absent."""
    problem: str = ""
    """Why some are unknown."""

    @property
    def seconds(self) -> dict[str, float]:
        """Predicted duration of each run, by name."""
        return {
            run.name: self.times[run.name].seconds(run)
            for run in self.grid.runs
            if run.name in self.times
        }

    def describe(self) -> str:
        """One line per point, and the total of the runs that have no result yet."""
        return "\n".join([*self._points(), *self.summary()])

    def as_object(self) -> dict[str, Any]:
        """Every run and its predicted time, as a JSON object; a time that is not known is null."""
        runs = [
            {
                "run": run.name,
                "point": run.point.name,
                "seed": run.config.training.seed,
                "parameters": parameter_count(run.config.model, run.config.data.vocab_size),
                "steps": run.config.training.steps,
                "step_seconds": self.times[run.name].step_seconds
                if run.name in self.times
                else None,
                "seconds": self.seconds.get(run.name),
                "has_result": has_result(run),
            }
            for run in self.grid.runs
        ]
        return {
            "study": self.grid.study.name,
            "device": self.gpu or "this machine",
            "parallel": self.parallel,
            "problem": self.problem or None,
            "runs": runs,
        }

    def summary(self) -> list[str]:
        """The total."""
        left = [run for run in self.grid.runs if not has_result(run)]
        known = [run for run in left if run.name in self.times]
        total = sum(self.seconds[run.name] for run in known)
        runs = count(len(left), "run")
        if self.problem:
            return [f"{runs} to do, at a cost that is not known: {self.problem}"]
        if not left:
            return [f"{count(len(self.grid.runs), 'run')}: all have their results"]
        if self.gpu is not None:
            hours = sum(self.seconds[run.name] * run.processes for run in known) / 3600
            return [f"{runs} to do: {hours:,.1f} GPU-hours on {self.gpu}, predicted"]
        wall = max(total / self.parallel, *(self.seconds[run.name] for run in known), 0.0)
        beside = f", {self.parallel} at a time if they do not slow each other" * (self.parallel > 1)
        startup = max(self.times[run.name].startup_seconds for run in known)
        return [
            f"{runs} to do: about {duration(wall)}{beside}; measured on this machine, with "
            f"{startup:.0f} s for each start"
        ]

    def _points(self) -> list[str]:
        lines, seen = [], set[str]()
        for run in self.grid.runs:
            if run.point.name in seen:
                continue
            seen.add(run.point.name)
            config, times = run.config, self.times.get(run.name)
            parameters = parameter_count(config.model, config.data.vocab_size)
            step = "-" if times is None else f"{times.step_seconds:.3g} s"
            whole = "-" if times is None else duration(times.seconds(run))
            steps = f"{config.training.steps:,}"
            lines.append([run.point.name, f"{parameters:,}", steps, step, whole])
        seeds = len(self.grid.runs) // max(1, len(seen))
        print_columns = ["point", "parameters", "steps", "step", f"time (x {count(seeds, 'seed')})"]
        return table_lines(print_columns, lines, left=[0])


def cost_of(
    grid: Grid, parallel: int, gpu: str | None = None, say: Callable[[str], None] = print
) -> Cost:
    """The cost of a grid; measures what the study's folder does not know yet.

    Args:
        grid: the runs.
        parallel: runs at the same time.
        gpu: device type to predict for, such as h200; None: measure on this machine.
        say: called with a message before measuring.

    Raises:
        UserError: the measuring process fails.
    """
    shapes = {run.name: _shape(run) for run in grid.runs}
    known = {} if gpu else _read(grid.out)
    missing = {shapes[run.name]: run for run in grid.runs if shapes[run.name] not in known}
    problem = ""
    if missing:
        if gpu is None:
            say(f"measuring the step of {count(len(missing), 'shape')} (--plan stops after it)")
        found, problem = _ask(list(missing.values()), gpu)
        known |= {shape: one for shape, one in zip(missing, found, strict=True) if one is not None}
        if gpu is None and grid.out.is_dir():
            _write(grid.out, known)
    times = {name: known[shape] for name, shape in shapes.items() if shape in known}
    return Cost(grid, parallel, gpu, times, problem)


def _ask(runs: Sequence[GridRun], gpu: str | None) -> tuple[list[Times | None], str]:
    """Times of some runs, None for one that has none, and why."""
    asked = [
        {"path": str(run.path), "settings": run.settings, "processes": run.processes}
        for run in runs
    ]
    began = time.time()
    found = _answer({"gpu": gpu, "runs": asked})
    startup = 0.0 if gpu else max(0.0, found["ready"] - began)
    problems = [one["problem"] for one in found["runs"] if "problem" in one]
    times = [
        None if "problem" in one else Times(startup, one["step_seconds"]) for one in found["runs"]
    ]
    return times, problems[0] if problems else ""


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the planner's process answers.

    Raises:
        UserError: it fails.
    """
    folder = Path(tempfile.mkdtemp(prefix="keel-study-"))
    asked, answer, log = (folder / name for name in ("request", "answer", "log"))
    try:
        asked.write_text(json.dumps(request), encoding="utf-8")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*python(), "-m", MODULE, str(asked), str(answer)],
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if code:
            end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
            raise UserError(f"the cost cannot be measured (--no-measure starts without):\n{end}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shape(run: GridRun) -> str:
    """Hash of what determines the time of a run's step."""
    settings = {
        key: value for key, value in flatten(run.config).items() if not key.startswith(_NO_SHAPE)
    }
    text = json.dumps([settings, run.processes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(out: Path) -> dict[str, Times]:
    with suppress(OSError, ValueError, TypeError, AttributeError):
        found = json.loads(read_small(out / FILE))
        return {shape: Times(*map(float, times)) for shape, times in found.items()}
    return {}


def _write(out: Path, known: Mapping[str, Times]) -> None:
    """Keep measured times; a study works without them."""
    kept = {shape: [one.startup_seconds, one.step_seconds] for shape, one in known.items()}
    with suppress(OSError):
        write_whole(out / FILE, json.dumps(kept, indent=1) + "\n")
