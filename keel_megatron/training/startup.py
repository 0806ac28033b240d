"""Checks of a run before any rank is started. No torch here, so that errors appear immediately.

The ranks check again, and more: another launcher may have started them, and some checks take long
(reading a large checkpoint) or need the device.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.identity import check_folder, check_identity, refuse_weights_only
from keel_megatron.config.run import RunConfig
from keel_megatron.corpus.find import check_paths
from keel_megatron.errors import UserError
from keel_megatron.evaluation import requests as evaluation_tasks
from keel_megatron.training.origin import check_origin

READ_BYTES = 1_000_000_000
"""Checkpoints up to this size are read here, in about a second; larger ones by all ranks."""


def check(config: RunConfig) -> None:
    """Check whether a run can be trained; nothing is written.

    Raises:
        UserError: the run's folder holds another run, or weights only, the run cannot start from
            training.initialize_from, evaluation.tasks has an unknown or unreadable task, or
            data.text or data.tokenizer cannot be read.
    """
    check_folder(config)
    newest = folder.latest(config.training.folder)
    if newest is not None and (newest / manifest.CONFIG).is_file():
        check_identity(newest / manifest.CONFIG, config)
        with suppress(manifest.DamagedError):  # the ranks look for another one
            refuse_weights_only(newest, manifest.read_json(newest / manifest.STATE))
    check_origin(config)
    if config.evaluation.every:
        evaluation_tasks.check(config.evaluation)
    check_paths(config.data)
    tokenizer = config.data.tokenizer
    is_used = config.data.dataset is None  # a dataset has its own
    if is_used and tokenizer is not None and not os.access(tokenizer, os.R_OK):
        found = "cannot be read" if tokenizer.exists() else "does not exist"
        raise UserError(
            f"data.tokenizer: {tokenizer} {found}; name a SentencePiece model, or a Hugging Face "
            "tokenizer.json"
        )


def complete(config: RunConfig) -> Path | None:
    """The newest checkpoint of a run that has completed all steps; None if it is damaged.

    None also if it is too large to read here.
    """
    newest = folder.latest(config.training.folder)
    if newest is None or folder.step_of(newest) < config.training.steps:
        return None
    try:
        files = manifest.read_manifest(newest)
        if sum(record.bytes for record in files.values()) > READ_BYTES:
            return None
        manifest.check(newest)
    except manifest.DamagedError:
        return None
    return newest


def complete_text(config: RunConfig, newest: Path) -> str:
    """The message for a run that is complete."""
    return (
        f"{config.training.folder} is complete: {folder.step_of(newest)} steps, newest checkpoint "
        f"{newest}.\nTo train further, raise training.steps; for another run, set training.name."
    )
