"""Saving while training continues: snapshot, write in the background, publish at a later step."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.manifest import FileRecord, shards_name
from keel_megatron.checkpoint.places import NotFilledError, Place, check_filled
from keel_megatron.checkpoint.shard_file import blocks
from keel_megatron.checkpoint.sharding import NotFiniteError, index
from keel_megatron.checkpoint.state import Position, Snapshot, Trained, snapshot
from keel_megatron.config.load import dump_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import DivergedError, UserError
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.tracking.records import CheckpointRecord
from keel_megatron.tracking.tracker import Tracker

_POLL_SECONDS = 0.02
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class _Report:
    """What a rank reports of its file."""

    record: FileRecord | None = None
    places: Sequence[tuple[Place, str]] = ()
    expected: int = 0
    """As of its snapshot."""
    error: str | None = None
    no_space: bool = False
    not_finite: str | None = None
    """Name of a tensor that holds NaN or infinity."""


class _Writer(threading.Thread):
    """Writes this rank's file. A daemon thread: the process may end before it."""

    def __init__(self, path: Path, content: Snapshot) -> None:
        super().__init__(name="checkpoint-writer", daemon=True)
        self._path = path
        self._content = content
        self.report = _Report(error="was not written")

    def run(self) -> None:
        """Write, sync and check; the values too."""
        content = self._content
        metadata = {"format": "pt", "rank_state": content.rank_state}
        try:
            record = manifest.write_checked(self._path, blocks(content.parts, metadata))
        except NotFiniteError as error:
            self.report = _Report(error=f"{error} is not finite", not_finite=str(error))
        except OSError as error:
            text = f"{error.strerror} ({self._path.name})"
            self.report = _Report(error=text, no_space=error.errno in _NO_SPACE)
        except Exception as error:  # the other ranks must be notified of any error
            self.report = _Report(error=f"{type(error).__name__}: {error} ({self._path.name})")
        else:
            self.report = _Report(record, content.places, content.expected)


@dataclass
class _Pending:
    """A save that is not published yet."""

    content: Snapshot
    writer: _Writer
    begun: float
    bytes: int
    """Of all ranks; known on rank 0."""
    stall: float = 0.0
    """Seconds for which training has waited."""


class Saver:
    """Writes a run's checkpoints; every method is collective over all ranks.

    A save begins to copy the state to the host's memory and returns; a thread of each rank writes
    its file, syncs it and reads it again. At the first step after all are done, rank 0 checks that
    the pieces of all ranks fill every tensor, writes the rest, the manifest last, and renames the
    folder. Until then the checkpoint does not exist, and only then are older ones removed. One with
    a master or moment that is not finite is never published: the run stops, whatever
    checkpoint.on_error is, since no later one could be better. With checkpoint.async_save = false,
    `save` does all of it.

    Args:
        config: the run.
        runtime: this rank's place.
        tracker: receives a record of each save.
        data: what the run is trained on (`data.dataset.Dataset.identity`).
        damaged: steps of damaged checkpoints, which retention neither counts nor removes.
        progress: called while a save is pending, for the watchdog.
        copied: files that each checkpoint keeps a copy of, on rank 0.
        anomaly_step: the step at which training went wrong lately, or None; see `folder.prune`.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        tracker: Tracker,
        *,
        data: dict[str, Any],
        damaged: Collection[int] = (),
        progress: Callable[[str], None] = lambda _what: None,
        copied: Collection[Path] = (),
        anomaly_step: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._tracker = tracker
        self._data = data
        self._damaged = set(damaged)
        self._progress = progress
        self._copied = {path.name: path.read_bytes() for path in copied}
        self._anomaly_step = anomaly_step
        self._pending: _Pending | None = None
        self.failure: str | None = None
        """Why the newest save failed; None if it did not."""

    def save(
        self,
        trained: Trained,
        position: Position,
        extras: dict[str, Any],
    ) -> None:
        """Begin the checkpoint of `position`, after finishing the one that is pending.

        Raises:
            DivergedError: a master weight or a moment is not finite.
            UserError: it cannot be written, and checkpoint.on_error is stop.
        """
        self.finish()
        begun = time.perf_counter()
        content = snapshot(
            self._config,
            self._runtime,
            trained,
            position,
            extras=extras,
            data=self._data,
            copy=self._config.checkpoint.async_save,
        )
        size = sum(self._runtime.gather(content.bytes))
        problem = self._runtime.from_main(lambda: self._prepare(position.step, size))
        if problem is not None:
            self._fail(problem)
            return
        run_folder = self._config.training.folder
        path = folder.partial_folder(run_folder, position.step) / shards_name(self._runtime.rank)
        self._pending = _Pending(content, _Writer(path, content), begun, size)
        self._pending.writer.start()
        if not self._config.checkpoint.async_save:
            self._wait()
            self._settle(begun)
        else:
            self._pending.stall += time.perf_counter() - begun

    def poll(self) -> None:
        """Publish the pending checkpoint if every rank has written its file.

        Raises:
            DivergedError: a master weight or a moment is not finite.
            UserError: it could not be written, and checkpoint.on_error is stop.
        """
        if self._pending is None:
            return
        begun = time.perf_counter()
        if self._runtime.any(self._pending.writer.is_alive()):
            self._pending.stall += time.perf_counter() - begun
        else:
            self._settle(begun)

    def finish(self) -> None:
        """Wait for the pending checkpoint, and publish it.

        Raises:
            DivergedError: a master weight or a moment is not finite.
            UserError: it could not be written, and checkpoint.on_error is stop.
        """
        if self._pending is not None:
            begun = time.perf_counter()
            self._wait()
            self._settle(begun)

    def set_aside(self, damaged: Collection[int]) -> None:
        """Treat the checkpoints of these steps as damaged, too."""
        self._damaged |= set(damaged)

    def _wait(self) -> None:
        """Until every rank has written; asking now and then, so that no collective times out."""
        assert self._pending is not None
        while self._runtime.any(self._pending.writer.is_alive()):
            self._pending.writer.join(_POLL_SECONDS)
            self._progress(f"a part of the save of step {self._pending.content.position.step}")

    def _prepare(self, step: int, size: int) -> str | None:
        """Rank 0: make room and a folder; or why that is not possible."""
        parent = folder.root(self._config.training.folder)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(parent).free < size:
                return self._message(step, size, "there is not enough space", no_space=True)
            folder.begin(self._config.training.folder, step)
        except OSError as error:
            return self._message(step, size, str(error.strerror), no_space=error.errno in _NO_SPACE)
        return None

    def _settle(self, begun: float) -> None:
        """Publish what every rank has written, or say why it is not there."""
        pending = self._pending
        assert pending is not None
        self._pending = None
        reports = self._runtime.gather(pending.writer.report)
        diverged = self._runtime.from_main(lambda: self._judge(pending, reports))
        if diverged is not None:
            raise DivergedError(diverged, reported=not self._runtime.is_main)
        problem = self._runtime.from_main(lambda: self._publish(pending, reports))
        if problem is not None:
            self._fail(problem)
            return
        self.failure = None
        step, now = pending.content.position.step, time.perf_counter()
        self._tracker.checkpoint(
            CheckpointRecord(
                step=step,
                checkpoint_stall_seconds=pending.stall + now - begun,
                checkpoint_seconds=now - pending.begun,
                checkpoint_bytes=pending.bytes,
            )
        )
        self._progress(f"the save of step {step}")
        self._tracker.say(f"saved {folder.step_folder(self._config.training.folder, step)}")

    def _judge(self, pending: _Pending, reports: list[_Report]) -> str | None:
        """Rank 0: what to say if a rank's state is not finite; the folder is removed then."""
        found = [(n, r.not_finite) for n, r in enumerate(reports) if r.not_finite is not None]
        if not found:
            return None
        step = pending.content.position.step
        shutil.rmtree(folder.partial_folder(self._config.training.folder, step), ignore_errors=True)
        rank, name = found[0]
        return (
            f"training has diverged: {name} is not finite (rank {rank}; {len(found)} of "
            f"{len(reports)} ranks have such a tensor), so the checkpoint of step {step} is not "
            "kept. Lower optimizer.learning_rate"
        )

    def _publish(self, pending: _Pending, reports: list[_Report]) -> str | None:
        """Rank 0: complete the folder and rename it; or why that is not possible."""
        content, run_folder = pending.content, self._config.training.folder
        step = content.position.step
        partial = folder.partial_folder(run_folder, step)
        for rank, report in enumerate(reports):
            if report.error is not None:
                return self._give_up(
                    partial, step, pending.bytes, f"rank {rank}: {report.error}", report.no_space
                )
        try:
            places = (place for report in reports for place, _dtype in report.places)
            check_filled(places, sum(report.expected for report in reports))
            self._complete(partial, content, reports)
            folder.publish(partial, damaged=step in self._damaged)
        except NotFilledError as error:
            shutil.rmtree(partial, ignore_errors=True)
            return f"the checkpoint of step {step} was not kept: {error}; this is a bug of keel"
        except OSError as error:
            text = f"{error.strerror} ({error.filename})"
            return self._give_up(partial, step, pending.bytes, text, error.errno in _NO_SPACE)
        self._damaged.discard(step)
        self._prune()
        return None

    def _complete(self, partial: Path, content: Snapshot, reports: list[_Report]) -> None:
        """The files that rank 0 writes for all, the manifest last."""
        files = {shards_name(rank): report.record for rank, report in enumerate(reports)}
        places = [(shards_name(rank), report.places) for rank, report in enumerate(reports)]
        text = dump_config(self._config).encode()
        written = {name: record for name, record in files.items() if record is not None}
        written[manifest.CONFIG] = manifest.write_checked(partial / manifest.CONFIG, [text])
        for name, copy in self._copied.items():
            written[name] = manifest.write_checked(partial / name, [copy])
        for name, value in (
            (manifest.STATE, content.run_state),
            (manifest.INDEX, index(places)),
            (manifest.BACKEND, manifest.BACKEND_MARK),
        ):
            written[name] = manifest.write_json(partial / name, value)
        manifest.write_manifest(partial, content.position.step, written)

    def _prune(self) -> None:
        settings = self._config.checkpoint
        try:
            folder.prune(
                self._config.training.folder,
                settings.keep,
                settings.keep_every,
                self._damaged,
                self._anomaly_step(),
                manifest.is_whole,
            )
        except OSError as error:
            where = error.filename or folder.root(self._config.training.folder)
            self._tracker.say(f"cannot remove {where}: {error.strerror or error}")

    def _give_up(self, partial: Path, step: int, size: int, reason: str, no_space: bool) -> str:
        text = self._message(step, size, reason, no_space=no_space)
        shutil.rmtree(partial, ignore_errors=True)
        if partial.exists():
            text += f"\n{partial} could not be removed: it is half-written"
        return text

    def _message(self, step: int, size: int, reason: str, *, no_space: bool) -> str:
        run_folder, settings = self._config.training.folder, self._config.checkpoint
        parent = folder.root(run_folder)
        latest = folder.latest(run_folder)
        if no_space:
            needed = f"{size / 1e6:,.1f} MB are needed, {_free(parent) / 1e6:,.1f} MB are free"
            advice = f"free some, lower checkpoint.keep ({settings.keep})"
        else:
            needed, advice = f"{size / 1e6:,.1f} MB are needed", "make it writable"
        return (
            f"the checkpoint of step {step} was not written to {parent}: {reason}; {needed}: "
            f"{advice} or set training.runs_dir to another disk\n"
            f"newest checkpoint: {latest or 'none'}"
        )

    def _fail(self, problem: str) -> None:
        self.failure = problem
        if self._config.checkpoint.on_error == "stop":
            raise UserError(
                f"{problem}\nthe run stops (checkpoint.on_error: stop)",
                reported=not self._runtime.is_main,
            )
        self._tracker.say(
            f"WARNING: {problem}\nthe run continues without it (checkpoint.on_error: continue)"
        )


def _free(path: Path) -> int:
    """Bytes that can be written at a path, or at the nearest parent that exists."""
    for candidate in (path, *path.parents):
        if candidate.is_dir():
            return shutil.disk_usage(candidate).free
    return 0
