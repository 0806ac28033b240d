"""Measure one run: load a checkpoint, walk down its depth for every batch, record."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from keel_megatron.checkpoint import state
from keel_megatron.checkpoint.manifest import MANIFEST
from keel_megatron.checkpoint.resume import ResumePoint
from keel_megatron.config.run import RunConfig
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.inference.source import config_of, find_checkpoint, tokenizer_path
from keel_megatron.layout.stages import own_partition
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime import machines
from keel_megatron.runtime.device import Launch, gpu_name
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.runtime.files import LineFile
from keel_megatron.studies.redundancy import records
from keel_megatron.studies.redundancy.records import Subject
from keel_megatron.studies.redundancy.stage import STUDY, Stage
from keel_megatron.studies.redundancy.text import Text, given_text, validation_text
from keel_megatron.studies.redundancy.units import NOTHING, Removal, Unit, sub_layers_of
from keel_megatron.studies.redundancy.walk import Found, Walk
from keel_megatron.tracking.progress import duration

BATCH_TOKENS: Final = 8192
"""Tokens of the variants that run together, by default."""
SECONDS_BETWEEN_LINES: Final = 5.0


@dataclass(frozen=True)
class Options:
    """How to measure."""

    unit: Unit = "sub-layer"
    removal: Removal = "sub-layer"
    tokens: int | None = None
    """Of the text; None: those of the run's validations, up to `text.MOST`."""
    batch_size: int | None = None
    """Sequences that run together, all variants counted; None: `BATCH_TOKENS` tokens."""
    step: int | None = None
    """Of the checkpoint; None: the newest."""
    text: Path | None = None
    """A file, in the place of the validation set."""
    seed: int = 0
    """Of the order of the validation set."""
    processes: int = 1
    """Ranks that share the model."""


def measure(run: Path, out: Path, options: Options) -> Subject:
    """Measure a run, or what of it an earlier call has left; on every rank the same.

    The model computes in fp32, whatever it was trained in.

    Args:
        run: folder of a run or a checkpoint.
        out: the study's folder.
        options: how to measure.

    Raises:
        UserError: its rule has several streams, there is no such checkpoint, its validation set is
            not found and no text is given, or the batches do not fit in memory.
    """
    config = config_of(run, options.processes)
    STUDY.sub_layer(0, config.model)  # refuses a rule that cannot be walked
    training = config.training.model_copy(update={"precision": "fp32"})
    config = config.model_copy(update={"training": training})
    launch = Launch.from_environment() if options.processes > 1 else Launch(0, 1, 0, 1)
    if launch.world_size != options.processes:
        raise UserError(
            f"--processes: {options.processes} is not the world size, {launch.world_size}"
        )
    with start(config.parallel, config.training, launch) as runtime:
        found = find_checkpoint(run, options.step, runtime)
        text = runtime.from_main(lambda: _text(run, config, found, options))
        subject = _subject(run, config, found, text, options)
        path = subject.file(out)
        done = runtime.from_main(lambda: _begun(path, subject))
        if not done.all():
            for remark in found.remarks if runtime.is_main else ():
                print(remark, file=sys.stderr)
            _measure(_Task(config, runtime, found, text, subject, path), done, options)
    return subject


@dataclass(frozen=True)
class _Task:
    """A run that is measured, on one rank."""

    config: RunConfig
    runtime: Runtime
    found: ResumePoint
    text: Text
    subject: Subject
    path: Path


def _text(run: Path, config: RunConfig, found: ResumePoint, options: Options) -> Text:
    """The sequences on which a run is measured."""
    assert found.path is not None
    if options.text is not None:
        tokenizer = open_tokenizer(tokenizer_path(run, found.path, found, config))
        return given_text(config, options.text, tokenizer, options.tokens)
    text = validation_text(config, found.state, options.tokens, options.seed)
    if text is None:
        raise UserError(
            f"--text: the dataset of {run} is not found (data.dataset, data.cache_dir); run the "
            "command in the folder in which training was started, or give a text: --text FILE"
        )
    return text


def _subject(
    run: Path, config: RunConfig, found: ResumePoint, text: Text, options: Options
) -> Subject:
    """What is measured of a run."""
    assert found.path is not None
    manifest = (found.path / MANIFEST).read_bytes()
    return Subject(
        run=config.training.name,
        folder=str(run),
        step=int(found.state["step"]),
        checkpoint=hashlib.sha256(manifest).hexdigest(),
        residual=config.model.residual,
        sub_layers=config.model.sub_layers,
        unit=options.unit,
        removal=options.removal,
        text=text.what,
        digest=text.digest,
        length=text.length,
        weights=text.weights,
    )


def _begun(path: Path, subject: Subject) -> NDArray[np.bool_]:
    """Make the file of the records, if there is none; what is done."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(records.heading(subject) + "\n", encoding="utf-8")
        return records.done(path, subject)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror}") from error


def _measure(task: _Task, done: NDArray[np.bool_], options: Options) -> None:
    """Measure what is not done; collective."""
    config, runtime, text, subject = task.config, task.runtime, task.text, task.subject
    size = options.batch_size or max(1, BATCH_TOKENS // text.length)
    b = min(size, text.sequences)
    size = min(size, b * subject.units)
    needed = memory(config, size, b, text.length)
    _require_memory(needed, runtime)
    batches = {first: _left(done, first, b) for first in range(0, text.sequences, b)}
    counts = {first: min(b, text.sequences - first) for first in batches}
    if runtime.is_main:
        _announce(subject, text, done, max(1, size // b), needed)
    walk = _walk(task, size)
    progress = Progress(sum(_cost(subject, batches[first], counts[first]) for first in batches))
    is_first, is_last = runtime.pipeline_rank == 0, walk.is_last
    _record_machines(task, begun=bool(done.any()))
    file = LineFile(task.path)

    def record(first: int, found: Found) -> None:
        if runtime.tensor_rank == 0:
            file.append(records.line(first, found))
            progress.add(_cost(subject, [found.unit], len(found.losses)))

    for first, units in batches.items():
        if not units:
            continue
        part = text.part(first, first + b).only(tokens=is_first, labels=is_last)
        removed = [unit for unit in units if unit != NOTHING]
        walk.run(
            part.to(runtime.device),
            (counts[first], text.length),
            removed,
            lambda found, first=first: record(first, found),  # type: ignore[misc]
        )
    file.close()
    runtime.barrier()


def _record_machines(task: _Task, *, begun: bool) -> None:
    """Record which machines measure, beside those of earlier starts; collective.

    Args:
        task: what they measure.
        begun: a part of it was measured before.
    """
    runtime, folder = task.runtime, task.path.parent
    places = runtime.gather(machines.this_place(gpu_name(runtime.device)))

    def write() -> None:
        first = not begun and set(folder.iterdir()) == {task.path}
        earlier = [] if first else machines.recorded(folder)
        try:
            machines.record(folder, machines.machines(places), earlier)
        except OSError as error:
            raise UserError(f"--out: {folder} cannot be written: {error.strerror}") from error

    runtime.from_main(write)


def _walk(task: _Task, size: int) -> Walk:
    """The run's model, loaded, ready to be walked."""
    config, runtime, subject = task.config, task.runtime, task.subject
    assert task.found.path is not None
    partition = own_partition(config, runtime)
    (chunk,) = build_model(config, runtime, partition)
    state.load_weights(task.found.path, runtime, [chunk])
    stages = [
        range(2 * part.first_block, 2 * (part.first_block + part.blocks))
        for part in partition.layout.chunks
    ]
    stage = Stage(chunk, config.model, subject.removal)
    return Walk(stage, stages, subject.unit, size, config.model.hidden_size, runtime)


def _left(done: NDArray[np.bool_], first: int, b: int) -> list[int]:
    """The units, NOTHING last, that are not done for all of a batch's sequences."""
    units = np.flatnonzero(~done[:, first : first + b].all(axis=1)).tolist()
    return [NOTHING if unit == len(done) - 1 else unit for unit in units]


def _cost(subject: Subject, units: list[int], b: int) -> int:
    """Passes of a sequence through a sub-layer."""
    return b * sum(
        subject.sub_layers - (sub_layers_of(unit, subject.unit).stop if unit != NOTHING else 0)
        for unit in units
    )


def memory(config: RunConfig, size: int, b: int, length: int) -> int:
    """Bytes of fp32 streams and of one sub-layer's results, at most.

    Args:
        config: the run.
        size: sequences that run together.
        b: sequences of the text among them; the trunk has as many more.
        length: tokens of each.
    """
    model, tensor = config.model, config.parallel.tensor
    # Stream before and after, its copy when a variant joins, branch and its input.
    streams = 5 * model.hidden_size
    # Query, key and value, rotated, and with the keys of every head; gate, up, product.
    attention = 3 * (model.num_attention_heads + 2 * model.query_groups) * model.head_dim
    numbers = streams + max(attention, 3 * model.ffn_hidden_size) // tensor
    if config.data.document_masks:
        numbers += length
    return 4 * (max(size, b) + b) * length * numbers


def _require_memory(needed: int, runtime: Runtime) -> None:
    """Refuse what does not fit."""
    if runtime.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--batch-size: the streams need {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are "
            "free; use fewer sequences per batch",
            reported=not runtime.is_main,
        )


def _announce(
    subject: Subject, text: Text, done: NDArray[np.bool_], variants: int, needed: int
) -> None:
    """Say what is measured, and with how much memory."""
    resumed = f"; {done.mean():.0%} of it was measured before" if done.any() else ""
    _say(
        f"{subject.run}, step {subject.step}: {subject.units} {subject.unit}s removed one by one, "
        f"on {text.sequences} x {text.length} tokens of {text.what}{resumed}"
    )
    _say(f"{variants} removals at a time: {needed / 1e9:.2g} GB beside the weights")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Says every few seconds what part of the passes is done, and how long the rest takes.

    Args:
        total: passes of a sequence through a sub-layer.
        say: called with a line.
        clock: a monotonic clock, seconds.
    """

    def __init__(
        self,
        total: int,
        say: Callable[[str], None] = _say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._done, self._say, self._clock = total, 0, say, clock
        self._started = self._said = clock()

    def add(self, passes: int) -> None:
        """Count passes of a sequence through a sub-layer."""
        self._done += passes
        now, share = self._clock(), min(1.0, self._done / self._total)
        # The first of many results says little about the speed.
        if now - self._said < SECONDS_BETWEEN_LINES or share < 0.01:
            return
        self._said = now
        self._say(f"{share:4.0%}  {duration((now - self._started) * (1 - share) / share)} left")
