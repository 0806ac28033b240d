"""A run's folder at a start: ownership, the checkpoint to resume from, and the claim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from keel_megatron.checkpoint.identity import (
    check_folder,
    check_identity,
    claim,
    refuse_weights_only,
)
from keel_megatron.checkpoint.manifest import CONFIG, COPIED
from keel_megatron.checkpoint.resume import ResumePoint, newest_good
from keel_megatron.config.reading import LARGE, read_small
from keel_megatron.config.run import RunConfig
from keel_megatron.data.dataset import Dataset
from keel_megatron.errors import UserError
from keel_megatron.runtime import exit_codes, ownership
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.files import write_whole
from keel_megatron.runtime.ownership import Ownership
from keel_megatron.training.initialize import Start
from keel_megatron.training.lineage import Lineage, accept
from keel_megatron.training.stop import StopRequest


@contextmanager
def owned_folder(folder: Path, runtime: Runtime, stop: StopRequest) -> Iterator[None]:
    """Context in which rank 0, or its launcher, owns the run's folder; collective.

    Raises:
        UserError: another process owns it.
    """
    held: list[Ownership] = []

    def take() -> None:
        held.append(ownership.passed_on(folder) or ownership.take(folder))

    runtime.from_main(take)
    try:
        stop.last_word = held[0].release if held else None
        yield
    finally:
        for hold in held:
            hold.release()


def find_resume_point(config: RunConfig, runtime: Runtime) -> ResumePoint:
    """The checkpoint to resume from, in a folder that belongs to this run; collective.

    Raises:
        UserError: the folder or its newest checkpoint belongs to another run, the checkpoint has
            no optimizer state, or every checkpoint is damaged.
    """
    runtime.from_main(lambda: check_folder(config))
    resume = newest_good(config.training.folder, runtime)
    newest = resume.path
    if newest is not None:
        runtime.from_main(lambda: check_identity(newest / CONFIG, config))
        runtime.from_main(lambda: refuse_weights_only(newest, resume.state))
    return resume


def claim_folder(
    config: RunConfig, resume: ResumePoint, data: Dataset, start: Start | None = None
) -> Lineage:
    """Make the folder this run's, with its tokenizer; rank 0 only.

    Files whose content is already correct are not rewritten, and need no disk space.

    Args:
        config: the run.
        resume: the checkpoint to resume from.
        data: what it is trained on.
        start: another run's weights, from which a new run starts.

    Returns:
        Identity of the run, and its changes.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = config.training.folder
    try:
        exit_codes.clear(folder)
        lineage = accept(config, resume, None if start is None else start.record)
        claim(config)
        _keep(data.kept_files, folder)
    except OSError as error:
        raise UserError(
            f"training.runs_dir: cannot write {error.filename or folder}: {error.strerror}"
        ) from error
    return lineage


def _keep(files: Sequence[Path], folder: Path) -> None:
    """Copy the tokenizer and the chat template into a run's folder: inference needs no dataset.

    Raises:
        OSError: the folder cannot be written.
    """
    for name in {*COPIED} - {file.name for file in files}:
        (folder / name).unlink(missing_ok=True)
    for file in files:
        write_whole(folder / file.name, read_small(file, LARGE))
