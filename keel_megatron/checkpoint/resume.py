"""Which checkpoint a run resumes from: the newest whose every file is as it was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.identity import identity_changes
from keel_megatron.checkpoint.manifest import (
    CONFIG,
    STATE,
    DamagedError,
    FileRecord,
    check_file,
    rank_of,
    read_json,
    read_manifest,
)
from keel_megatron.config.load import load_config
from keel_megatron.errors import ConfigError, UserError
from keel_megatron.runtime.distributed import Runtime


@dataclass(frozen=True)
class ResumePoint:
    """What a run resumes from; the same on every rank."""

    path: Path | None = None
    """The newest good checkpoint; None if there is none: the run starts at step 0."""
    state: dict[str, Any] = field(default_factory=dict)
    """Its state.json."""
    remarks: tuple[str, ...] = ()
    """Which checkpoints were skipped, and why."""
    damaged: frozenset[int] = frozenset()
    """Steps of the damaged ones that were skipped; they are left where they are."""

    @property
    def step(self) -> int | None:
        """The checkpoint's step; None if there is no checkpoint."""
        return None if self.path is None else folder.step_of(self.path)


def newest_good(run_folder: Path, runtime: Runtime, multiple_of: int = 1) -> ResumePoint:
    """The newest good checkpoint of a run; collective over all ranks.

    The ranks share the reading; rank 0 decides and broadcasts.

    Args:
        run_folder: the run's folder.
        runtime: this rank's place.
        multiple_of: look only at those of multiples of so many steps; 0 = at that of step 0.

    Raises:
        UserError: there are checkpoints, and every one is damaged; on every rank.
    """
    steps = runtime.from_main(lambda: folder.steps(run_folder))
    remarks = runtime.from_main(lambda: [_unfinished(path) for path in folder.remains(run_folder)])
    damaged: list[int] = []
    for step in reversed(steps):
        if step % multiple_of if multiple_of else step:
            continue
        path = folder.step_folder(run_folder, step)
        problem, state = _judge(path, run_folder, runtime)
        if problem is None:
            return ResumePoint(path, state, tuple(remarks), frozenset(damaged))
        damaged.append(step)
        remarks.append(f"{path} is damaged and left for inspection: {problem}")
    if damaged:
        raise UserError(
            "\n".join(remarks)
            + f"\nno checkpoint of {run_folder} is valid; to start the run from step 0, move that "
            "folder away or change training.name",
            reported=not runtime.is_main,
        )
    return ResumePoint(remarks=tuple(remarks))


def checked(path: Path, runtime: Runtime) -> ResumePoint:
    """One checkpoint, read whole; collective over all ranks.

    Raises:
        UserError: it is damaged; on every rank.
    """
    # A link of its user's: the checkpoint that it leads to.
    problem, state = _judge(path.resolve(), None, runtime)
    if problem is not None:
        raise UserError(f"{path} is damaged: {problem}", reported=not runtime.is_main)
    return ResumePoint(path, state)


def _unfinished(path: Path) -> str:
    if path.suffix == ".partial":
        return f"{path} is not complete: it is not used, and left until its step is saved again"
    return f"{path} was set aside when its step was saved again: it is not used"


def _judge(
    path: Path, run_folder: Path | None, runtime: Runtime
) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a checkpoint, if anything, and its state.json."""
    problem, files, state = runtime.from_main(lambda: _outline(path, run_folder))
    if problem is not None:
        return problem, {}
    mine = None
    try:
        for name, record in files.items():
            # A rank's own file is then at hand when it is loaded.
            if (rank_of(name) or 0) % runtime.launch.world_size == runtime.rank:
                check_file(path, name, record)
    except DamagedError as error:
        mine = str(error)
    problems = runtime.gather(mine)
    problem = runtime.from_main(lambda: next((text for text in problems if text), None))
    return problem, state


def _outline(
    path: Path, run_folder: Path | None
) -> tuple[str | None, dict[str, FileRecord], dict[str, Any]]:
    """The first look: names, sizes, and whose it is."""
    try:
        files, state = read_manifest(path), read_json(path / STATE)
        if run_folder is not None:
            _check_identity(path, run_folder)
        return None, files, state
    except DamagedError as error:
        return str(error), {}, {}


def _check_identity(path: Path, run_folder: Path) -> None:
    """Check that a checkpoint belongs to the run in whose folder it is."""
    try:
        own, saved = load_config(run_folder / CONFIG), load_config(path / CONFIG)
    except ConfigError:
        return  # the run's is not there, or one is of another version: loading compares the tensors
    changes = list(identity_changes(saved, own))
    if changes:
        name, there, here = changes[0]
        raise DamagedError(f"it belongs to another run: {name} is {there} in it, {here} in the run")
