"""Loads weights and tokenizer for generation, from the folder of a run or a checkpoint.

Needs neither the training data nor data.cache_dir, and does not depend on the working directory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from keel_megatron.checkpoint import folder, state
from keel_megatron.checkpoint.identity import saved_config
from keel_megatron.checkpoint.manifest import CONFIG, MANIFEST, TOKENIZERS
from keel_megatron.checkpoint.resume import ResumePoint, checked, newest_good
from keel_megatron.config.load import load_config
from keel_megatron.config.parallel import ParallelConfig
from keel_megatron.config.reading import LARGE, read_small
from keel_megatron.config.run import RunConfig
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import Tokenizer, open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.distributed import Runtime

_EARLIER = "tokenizer.model"
"""The tokenizer of an earlier version's prepared data."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to generate from, loaded."""

    config: RunConfig
    model: nn.Module
    tokenizer: Tokenizer | HuggingFaceTokenizer
    remarks: tuple[str, ...]
    """Skipped checkpoints, with reasons."""


def config_of(path: Path) -> RunConfig:
    """The configuration of a run, from its folder or one of its checkpoints.

    Changed for one process, on a GPU if there is one and the run did not set device: cpu.

    Raises:
        UserError: the folder is neither.
    """
    config = load_config(path / CONFIG) if is_checkpoint(path) else saved_config(path)
    device = "cpu" if config.training.device == "cpu" else "auto"
    return config.model_copy(
        update={
            "parallel": ParallelConfig(timeout_seconds=config.parallel.timeout_seconds),
            "training": config.training.model_copy(update={"threads": 0, "device": device}),
        }
    )


def load(path: Path, config: RunConfig, runtime: Runtime) -> Source:
    """Build the model and load a checkpoint: the given one, or the newest valid one of a run.

    Args:
        path: folder of a run or a checkpoint.
        config: the result of `config_of`.
        runtime: a runtime with only this process.

    Raises:
        UserError: there is no valid checkpoint, or its tokenizer is missing.
    """
    model: nn.Module | None = None
    while True:
        before = folder.steps(path)
        try:
            found = checked(path, runtime) if is_checkpoint(path) else newest_good(path, runtime)
            if found.path is None:
                raise UserError(f"{path} has no complete checkpoint; train the run first")
            tokenizer = open_tokenizer(tokenizer_path(path, found.path, found, config))
            if model is None:
                (model,) = build_model(config, runtime)
            state.load_weights(found.path, runtime, [model])
        except (UserError, OSError):
            # A running training may have removed this checkpoint meanwhile.
            if folder.steps(path) == before:
                raise
            continue
        return Source(config, model.eval(), tokenizer, found.remarks)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, not a run's."""
    return (path / MANIFEST).is_file()


def tokenizer_path(given: Path, checkpoint: Path, found: ResumePoint, config: RunConfig) -> Path:
    """The tokenizer of the checkpoint, or of the prepared data for checkpoints without one."""
    for name in TOKENIZERS:
        if (checkpoint / name).is_file():
            return checkpoint / name
    data = found.state.get("data", {})
    digest = data.get("files", {}).get(_EARLIER, {}).get("sha256")
    prepared = config.data.cache_dir / str(data.get("fingerprint"))[:16]
    run = checkpoint.parent.parent if given == checkpoint else given
    for place in (run / _EARLIER, prepared / _EARLIER):
        if place.is_file() and hashlib.sha256(read_small(place, LARGE)).hexdigest() == digest:
            return place
    raise UserError(
        f"{checkpoint} has no tokenizer, because an earlier version wrote it, and {prepared} "
        "(data.cache_dir) does not exist; run the command in the folder in which training was "
        "started, or restore that folder"
    )
