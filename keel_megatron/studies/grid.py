"""A study's grid of runs: what each run changes, where its folder is, and the check of all of them.

A study is a module with three functions: one that lists the points of its grid, one that takes its
own numbers from a finished run's folder, and one each for the table and the picture. Everything
else is the same for all studies (runner.py, results.py). Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.config.load import flatten, load_config
from keel_megatron.config.run import RunConfig
from keel_megatron.config.yaml_text import read_inline
from keel_megatron.errors import ConfigError, UserError
from keel_megatron.runtime.cores import available_cores

Label = str | int | float | None
Row = dict[str, Any]
"""One run's entry in results.json: its labels, what results.py measures, and the study's own."""

_OWN = ("training.name", "training.runs_dir", "training.seed")
"""Settings that the machinery gives each run."""
_NOT_IDENTITY = (
    "training.name",
    "training.runs_dir",
    "training.threads",
    "training.gc_every",
    "training.exit_after",
    "training.hang_timeout",
    "checkpoint.",
    "data.cache_dir",
    "data.build",
    "parallel.timeout_seconds",
    "parallel.preflight",
    "tracking.mlflow",
    "tracking.uri",
    "tracking.experiment",
    "tracking.system_metrics_every",
    "tracking.log_every",
    "tracking.sample_prompt",
)
"""Settings that change neither a run's numbers nor its records, so a study resumes under others."""


@dataclass(frozen=True)
class Point:
    """One point of a grid; `--seeds K` makes K runs of it."""

    name: str
    """Unique in the study, letters, digits, `.`, `_` and `-`: part of the folders' names."""
    overrides: Mapping[str, Any]
    """What it changes: "section.key" to a value."""
    labels: Mapping[str, Label]
    """Its place in the grid, for the table and the picture."""


@dataclass(frozen=True)
class Axes:
    """The options --rules and --depths."""

    rules: tuple[str, ...]
    """Residual rules; empty: the study's own choice."""
    depths: tuple[int, ...]
    """Numbers of sub-layers; the configuration's if none are given."""


@dataclass(frozen=True)
class Study:
    """A study: its points, and what is made of their runs."""

    name: str
    points: Sequence[Point]
    table: Callable[[Sequence[Row]], str]
    """Markdown of the rows of all runs so far; never called without rows."""
    picture: Callable[[Sequence[Row], Path], None]
    """Draws the rows into a PNG file."""
    row: Callable[[Point, Path], Mapping[str, Any]] = lambda _point, _folder: {}
    """The study's own numbers of a run that has finished or diverged, from its folder; JSON."""


@dataclass(frozen=True)
class GridRun:
    """One run of a grid: a point with a seed."""

    point: Point
    seed: int
    config: RunConfig
    path: Path
    """The study's YAML file."""
    settings: tuple[str, ...]
    """All overrides of `keel train`."""
    processes: int
    """Ranks: one replica of the layout."""

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return self.config.training.name

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.training.folder

    @property
    def labels(self) -> dict[str, Label]:
        """The point's labels and the seed."""
        return {**self.point.labels, "seed": self.seed}

    @property
    def command(self) -> list[str]:
        """Arguments of `keel`."""
        processes = ["--processes", str(self.processes)]
        return ["train", *processes, str(self.path), *self.settings]


@dataclass(frozen=True)
class Grid:
    """All runs of a study, checked."""

    study: Study
    out: Path
    """The study's folder, which holds the runs' folders."""
    runs: tuple[GridRun, ...]


def depth(sub_layers: int) -> dict[str, int]:
    """The override for a depth.

    Raises:
        UserError: it is odd.
    """
    if sub_layers % 2 or sub_layers < 2:
        raise UserError(f"--depths: {sub_layers} must be even and positive: two per block")
    return {"model.blocks": sub_layers // 2}


def make_grid(
    study: Study,
    path: Path,
    overrides: Sequence[str],
    out: Path,
    seeds: int = 1,
    parallel: int = 1,
    *,
    to_start: bool = True,
) -> Grid:
    """The runs of a study, each one's configuration checked as `keel train` checks it.

    A folder's name ends with a hash of the settings that determine the run's numbers. So after a
    change of the grid, the configuration or the overrides, unchanged runs are kept, changed ones
    are new runs, and no folder is ever used for two.

    Args:
        study: the study.
        path: the YAML file.
        overrides: the user's `section.key=value`.
        out: the study's folder.
        seeds: runs of each point; their seeds count from training.seed.
        parallel: runs at the same time, which share the cores; 0: one run has the machine.
        to_start: also check what a start needs, such as the data.

    Raises:
        UserError: the overrides and the study set the same thing.
        ConfigError: some points are not valid runs; it lists all problems.
    """
    from keel_megatron.training import startup  # reads tokenizers: not for `keel --help`

    base = load_config(path, overrides)
    _refuse_conflicts(study, overrides, base)
    found: list[GridRun] = []
    wrong: Counter[tuple[str, str]] = Counter()
    error: ConfigError | None = None
    for point in study.points:
        for number in range(seeds):
            seed = base.training.seed + number
            try:
                run = _run(point, seed, path, overrides, out, parallel)
                if to_start:
                    startup.check(run.config)
                found.append(run)
            except ConfigError as caught:
                error = caught
                wrong.update({(p.path, p.message) for p in caught.problems})
            except UserError as caught:
                wrong[("", str(caught))] += 1
    if wrong:
        total = len(study.points) * seeds
        lines = [
            f"  {f'{where}: ' if where else ''}{what}" + (f" ({n} runs)" if n < total else "")
            for (where, what), n in wrong.items()
        ]
        raise UserError(
            "\n".join([f"{path}: the grid of the study {study.name} is not valid:", *lines])
        ) from error
    return Grid(study, out, tuple(found))


def _refuse_conflicts(study: Study, overrides: Sequence[str], base: RunConfig) -> None:
    """Refuse settings of the user that the study changes."""
    given = flatten(base)
    changed = {
        key
        for point in study.points
        for key, value in point.overrides.items()
        if given.get(key) != value
    }
    for override in overrides:
        key = override.partition("=")[0]
        if key in changed:
            raise UserError(f"{key}: the study {study.name} sets it for each of its runs")
        if key in ("training.name", "training.runs_dir"):
            raise UserError(f"{key}: the study names its runs; --out chooses the folder")


def _run(
    point: Point, seed: int, path: Path, overrides: Sequence[str], out: Path, parallel: int
) -> GridRun:
    """One run; its configuration is loaded twice, because the folder's name depends on it.

    Raises:
        ConfigError: the configuration is not valid.
    """
    own = {**point.overrides, "training.seed": seed, "training.runs_dir": str(out)}
    changes = [*overrides, *(f"{key}={_written(value)}" for key, value in own.items())]
    config = load_config(path, [*changes, f"training.name={point.name}"])
    processes = config.parallel.model_parallel_size
    changes.append(f"training.name={point.name}-s{seed}-{_digest(config)}")
    if parallel and not config.training.threads:
        threads = max(1, available_cores() // (parallel * processes))
        changes.append(f"training.threads={threads}")
    config = load_config(path, changes, world_size=processes)
    return GridRun(point, seed, config, path, tuple(changes), processes)


def _written(value: Any) -> str:
    """A value in YAML, text without quotes where it can be."""
    with suppress(ValueError):
        if isinstance(value, str) and read_inline(value) == value:
            return value
    return json.dumps(value)


def _digest(config: RunConfig) -> str:
    """Hash of the settings that determine a run's numbers.

    Of those that are not at their default: a setting that a later version adds changes nothing.
    """
    sections = config.model_dump(mode="json", exclude_defaults=True)
    settings = {
        path: value
        for section, values in sections.items()
        for key, value in values.items()
        if not (path := f"{section}.{key}").startswith(_NOT_IDENTITY)
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
