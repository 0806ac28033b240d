"""A run's dataset: found or built, checked and indexed before the run's ranks meet.

Building may take hours, so nothing of it happens while processes wait in a collective. The process
that starts the ranks does it, and tells them where the folder is; under another launcher every
rank does it, and all but the first of a machine wait for a lock, which has no time limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel_megatron.checkpoint.folder import latest, step_folder, step_of, steps
from keel_megatron.checkpoint.manifest import STATE, DamagedError, read_json
from keel_megatron.config.run import RunConfig
from keel_megatron.corpus.ensure import ensure_dataset
from keel_megatron.data.dataset import Dataset, check_lengths, open_dataset
from keel_megatron.data.earlier import is_earlier
from keel_megatron.data.file_checks import check_files
from keel_megatron.data.identity import ANOTHER_RUN, refuse_other
from keel_megatron.data.index_files import open_sequences
from keel_megatron.data.packing import PackedSequences
from keel_megatron.errors import UserError
from keel_megatron.training.origin import data_of_position, on_data_of_position
from keel_megatron.training.startup import check

if TYPE_CHECKING:
    from keel_megatron.data.batches import Batches  # these import torch
    from keel_megatron.runtime.device import Launch
    from keel_megatron.tracking.tracker import Tracker

DATASET = "KEEL_DATASET"
"""Variable with the dataset folder that the launching process has made ready for its ranks."""
Say = Callable[[str], None]


def ready_dataset(config: RunConfig, say: Say, *, on_one_machine: bool) -> Path:
    """Make a run's dataset ready: build it if it is missing, check it, make its index files.

    Args:
        config: the run.
        say: called with messages.
        on_one_machine: whether all ranks of the run are on this machine; otherwise nothing is
            built.

    Returns:
        The dataset folder.

    Raises:
        UserError: the dataset is missing and may not be built here, cannot be built, is damaged, or
            is not the one of the run's checkpoints.
    """
    say = _tolerant(say)
    own = trained_on(config.training.folder)
    expected = data_of_position(config) if own is None else own
    with on_data_of_position(kept=own is None and expected is not None):
        folder = find_dataset(config, say, expected, may_build=on_one_machine)
        dataset = open_dataset(folder, config.data)
        if expected is not None:
            refuse_other(expected, dataset)
    check_lengths(dataset, config.data.seq_length)
    check_files(dataset, config.data.cache_dir, say)
    for source in dataset.sources:
        for part in ("train", "validation"):
            sequences = open_sequences(
                dataset,
                source,
                part,
                config.data.seq_length,
                config.training.seed,
                config.data.cache_dir,
                say,
                check=True,
            )
            if isinstance(sequences, PackedSequences):
                say(f"{source.name}, {part}: {sequences.describe()}")
    return folder


def dataset_of_rank(config: RunConfig, launch: Launch, said: list[str]) -> Path | None:
    """A run's dataset folder, made ready by this rank if no launching process has.

    Called before the process group. One rank of each machine reports.

    Args:
        config: the run.
        launch: this rank's place.
        said: gets the messages.

    Returns:
        The folder; None for a run that is complete.

    Raises:
        UserError: as in `ready_dataset`, or the run's folder holds another run.
    """
    folder = given_dataset()
    if folder is not None:
        return folder
    newest = latest(config.training.folder)
    if newest is not None and step_of(newest) >= config.training.steps:
        return None

    def say(text: str) -> None:
        said.append(text)
        if launch.local_rank == 0:
            print(text, flush=True)

    try:
        check(config)
        return ready_dataset(
            config, say, on_one_machine=launch.world_size == launch.local_world_size
        )
    except UserError as error:
        error.reported = launch.local_rank != 0
        raise


def given_dataset(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder that the launching process has made ready; None under another launcher."""
    folder = environment.get(DATASET)
    return Path(folder) if folder else None


def trained_on(run_folder: Path) -> dict[str, Any] | None:
    """The identity of the data in a run's newest readable checkpoint; None without one."""
    for step in reversed(steps(run_folder)):
        with suppress(DamagedError, AttributeError):
            found = read_json(step_folder(run_folder, step) / STATE).get("data")
            if isinstance(found, dict):
                return found
    return None


def opened(config: RunConfig, folder: Path, expected: dict[str, Any] | None) -> Dataset:
    """Open a folder that is ready, and compare it with the checkpoint that the run resumes from.

    Raises:
        UserError: it is damaged, or another one.
    """
    dataset = open_dataset(folder, config.data)
    if expected is not None:
        refuse_other(expected, dataset)
    return dataset


def find_dataset(
    config: RunConfig, say: Say, expected: dict[str, Any] | None, *, may_build: bool
) -> Path:
    """A run's dataset folder, built if it is missing.

    Args:
        config: the run.
        say: called with messages.
        expected: the identity in the run's newest checkpoint; None: there is none.
        may_build: whether to build a missing one.

    Raises:
        UserError: it is missing and may not be built, cannot be built, or its sources are not
            those of the checkpoint.
    """
    data = config.data
    if data.dataset is None and expected is not None and is_earlier(expected):
        folder = data.cache_dir / str(expected["fingerprint"])[:16]
        if not (folder / "data.json").is_file():
            raise UserError(
                f"data.cache_dir: an earlier version started this run with {folder}, which does "
                f"not exist; restore that folder, or {ANOTHER_RUN}"
            )
        say(f"using {folder}, with which an earlier version started this run")
        return folder
    return ensure_dataset(config, say, expected, may_build=may_build)


def tell_shares(batches: Batches, tracker: Tracker, consumed: int) -> None:
    """Report the realised shares of a blend."""
    samples = batches.train.samples
    if len(samples.sources) > 1 and consumed:
        tracker.say(f"samples so far: {samples.describe(consumed)}")


def _tolerant(say: Say) -> Say:
    """Messages that ignore a closed output."""

    def said(text: str) -> None:
        with suppress(OSError):
            say(text)

    return said
