"""A new run that starts from another's weights: `training.initialize_from`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from keel_megatron.checkpoint import manifest
from keel_megatron.checkpoint.json_codec import from_json
from keel_megatron.checkpoint.manifest import DamagedError, read_json
from keel_megatron.checkpoint.parameters import updates
from keel_megatron.checkpoint.resume import ResumePoint, checked, newest_good
from keel_megatron.checkpoint.sharding import Reader, TensorReader
from keel_megatron.checkpoint.state import Trained, agree
from keel_megatron.config.reading import LARGE, read_small
from keel_megatron.config.run import RunConfig
from keel_megatron.data.dataset import Dataset
from keel_megatron.data.file_checks import sha256
from keel_megatron.errors import UserError
from keel_megatron.huggingface.configuration import CONFIG
from keel_megatron.huggingface.importing import open_folder
from keel_megatron.mlflow_delivery.run_file import RunFile
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.training.origin import (
    SETTING,
    TokenizerFile,
    config_of,
    locate,
    refuse,
    refuse_no_optimizer,
    refuse_other_optimizer,
    refuse_other_tokenizer,
    refuse_position,
    tokenizer_of,
)


@dataclass(frozen=True)
class Start:
    """What a new run starts from, checked; the same on every rank."""

    record: dict[str, Any]
    """What checkpoints and the MLflow run keep of it: the folder's path, the run's id, step and
    MLflow run's id, the fingerprint of the weights, and whether optimizer state and position were
    kept.

    The fingerprint is the SHA-256 of a checkpoint's manifest.json, which has the size and the
    checksum of every file, or of the SHA-256 of config.json and each file with weights.
    """
    tokenizer: TokenizerFile | None
    """None if an earlier version has kept nothing of it."""
    reader: Callable[[], TensorReader]
    """Opens the weights."""
    updates: int | None = None
    """Updates that the kept optimizer state has counted; None: a fresh optimizer."""
    continues: ResumePoint | None = None
    """The checkpoint that the run continues from its position; None: the run starts at step 1."""
    remarks: tuple[str, ...] = ()
    """Checkpoints of the origin that were skipped, and why."""
    check_same: Callable[[], None] = lambda: None
    """Raises a UserError if a checkpoint is no longer the one of the record."""

    def check_tokenizer(self, data: Dataset) -> None:
        """See that the data is in the tokens that the weights know.

        Raises:
            UserError: it is not.
        """
        if self.tokenizer is not None:
            refuse_other_tokenizer(self.tokenizer, data)

    def load(self, trained: Trained, runtime: Runtime) -> None:
        """Give a new engine the weights, at its layout; collective over all ranks.

        Raises:
            UserError: they cannot be read; on every rank.
        """
        problem = None
        try:
            trained.fill(self.reader(), masters_only=self.updates is None)
        except (DamagedError, UserError) as error:
            problem = f"{SETTING}: {self.record['path']} cannot be loaded: {error}"
        agree(runtime, problem)
        runtime.from_main(self.check_same)
        trained.apply(self.updates or 0)

    def line(self) -> str:
        """The message for the user."""
        step, count = self.record["step"], self.updates
        if self.continues is not None:
            return f"continuing {self.record['path']} after step {step}, as another run"
        of_step = "" if step is None else f" of step {step}"
        optimizer = "a fresh optimizer" if count is None else f"its optimizer of {count} updates"
        return f"starting from the weights{of_step} in {self.record['path']}, with {optimizer}"


def open_start(config: RunConfig, runtime: Runtime, resume: ResumePoint) -> Start | None:
    """What a run starts from; None if it has a checkpoint of its own. Collective over all ranks.

    Args:
        config: the run.
        runtime: this rank's place.
        resume: the checkpoint to resume from.

    Raises:
        UserError: the run cannot start from it; on every rank.
    """
    given = config.training.initialize_from
    if given is None or resume.path is not None:
        return None
    place = runtime.from_main(lambda: locate(given))
    if place.kind == "huggingface":
        return _from_folder(config, place.path, runtime)
    if place.kind == "run":
        found = newest_good(place.path, runtime)
    else:
        found = checked(place.path, runtime)
    return _from_checkpoint(config, found, runtime)


def _from_checkpoint(config: RunConfig, found: ResumePoint, runtime: Runtime) -> Start:
    path, state = found.path, found.state
    if path is None:
        raise UserError(f"{SETTING}: there is no complete checkpoint", reported=not runtime.is_main)

    def accepted() -> tuple[dict[str, Any], TokenizerFile | None, int | None]:
        """On rank 0: record of the origin, its tokenizer, and its count of updates if kept."""
        of_origin = config_of(path)
        refuse(config, path, of_origin)
        refuse_no_optimizer(config, path, state)
        refuse_other_optimizer(config, path, of_origin)
        refuse_position(config, path, of_origin)
        digest = fingerprint(path)
        extras = state.get("extras", {})
        run = RunFile.from_json(extras.get("run"))
        record = {
            "path": str(path.resolve()),
            "run_id": None if run is None else run.id,
            "mlflow_run_id": extras.get("mlflow_run_id"),
            "step": state["step"],
            "fingerprint": digest,
            "optimizer": config.training.keep_optimizer,
            "position": config.training.keep_position,
        }
        count = _updates(path, state) if config.training.keep_optimizer else None
        return record, tokenizer_of(path, state), count

    record, tokenizer, count = runtime.from_main(accepted)

    def reader() -> TensorReader:
        return Reader(path, read_json(path / manifest.INDEX))

    same = partial(check_same, path, record)
    continues = found if config.training.keep_position else None
    return Start(record, tokenizer, reader, count, continues, found.remarks, same)


def check_same(path: Path, record: dict[str, Any]) -> None:
    """See that a checkpoint is still the one of a record.

    Raises:
        UserError: it was replaced, or removed.
    """
    if fingerprint(path) != record["fingerprint"]:
        raise UserError(f"{SETTING}: {path} was replaced while it was read; start again")


def fingerprint(path: Path) -> str:
    """SHA-256 of a checkpoint's manifest.

    Raises:
        UserError: it cannot be read, or is gone.
    """
    try:
        return hashlib.sha256(read_small(path / manifest.MANIFEST, LARGE)).hexdigest()
    except OSError as error:
        raise UserError(f"{SETTING}: {path} cannot be read: {error.strerror}") from None


def _updates(path: Path, state: dict[str, Any]) -> int:
    try:
        return updates(from_json(state["common"]))
    except (DamagedError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{SETTING}: {path} is damaged: {error}") from None


def _from_folder(config: RunConfig, path: Path, runtime: Runtime) -> Start:
    """From a Hugging Face folder; the ranks share the reading for the fingerprint."""
    refuse_weights = {manifest.WEIGHTS_ONLY: True}
    runtime.from_main(lambda: refuse_no_optimizer(config, path, refuse_weights))

    def names() -> tuple[list[str], TokenizerFile]:
        opened = open_folder(path)
        refuse(config, path, opened.config)
        name, content = opened.tokenizer
        tokenizer = TokenizerFile(path / name, hashlib.sha256(content).hexdigest())
        return [CONFIG, *sorted(opened.weights.files)], tokenizer

    files, tokenizer = runtime.from_main(names)
    found: dict[str, str] = {}
    problem = None
    try:
        for name in files[runtime.rank :: runtime.launch.world_size]:
            found[name] = sha256(path / name)
    except OSError as error:
        problem = f"{SETTING}: {error.filename or path} cannot be read: {error.strerror}"
    agree(runtime, problem)
    parts = runtime.gather(found)  # on rank 0

    def of_files() -> str:
        digests = {name: digest for part in parts for name, digest in part.items()}
        lines = "".join(f"{digests[name]} {name}\n" for name in files)
        return hashlib.sha256(lines.encode()).hexdigest()

    record = {
        "path": str(path.resolve()),
        "run_id": None,
        "mlflow_run_id": None,
        "step": None,
        "fingerprint": runtime.from_main(of_files),
        "optimizer": False,
        "position": False,
    }

    def reader() -> TensorReader:
        return open_folder(path).reader()

    return Start(record, tokenizer, reader)
