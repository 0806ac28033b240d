"""Loads weights and tokenizer, from the folder of a run or a checkpoint, or a Hugging Face folder.

Needs neither the training data nor data.cache_dir, and does not depend on the working directory.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from keel_megatron.checkpoint import folder, state
from keel_megatron.checkpoint.identity import saved_config
from keel_megatron.checkpoint.manifest import CONFIG, MANIFEST, TOKENIZERS
from keel_megatron.checkpoint.resume import ResumePoint, checked, newest_good
from keel_megatron.config.kernels import KernelsConfig
from keel_megatron.config.load import load_config
from keel_megatron.config.parallel import ParallelConfig
from keel_megatron.config.reading import LARGE, read_small
from keel_megatron.config.run import RunConfig
from keel_megatron.data.chat.templates import TemplateFile, template_beside
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import Tokenizer, open_tokenizer
from keel_megatron.errors import UserError
from keel_megatron.huggingface.configuration import CONFIG as HUGGING_FACE
from keel_megatron.huggingface.importing import open_folder
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import Runtime, start
from keel_megatron.runtime.tables import count

_EARLIER = "tokenizer.model"
"""The tokenizer of an earlier version's prepared data."""


@dataclass(frozen=True)
class Source:
    """A model to generate from or to evaluate, loaded."""

    config: RunConfig
    model: nn.Module
    tokenizer: Tokenizer | HuggingFaceTokenizer
    remarks: tuple[str, ...]
    """Skipped checkpoints, with reasons."""
    step: int | None = None
    """Of the checkpoint; None: a Hugging Face folder."""
    template: TemplateFile | None = None
    """The chat template beside the tokenizer, if there is one."""


@contextmanager
def opened(
    path: Path,
    *,
    step: int | None = None,
    processes: int = 1,
    model_processes: int = 1,
    option: str = "--processes",
    timeout_seconds: float | None = None,
) -> Iterator[tuple[Source, Runtime]]:
    """A source, loaded by this process or, with several, by each of them.

    Remarks are printed to stderr.

    Args:
        path: folder of a run or a checkpoint, or a Hugging Face folder.
        step: of a run's checkpoint; None: the newest valid one.
        processes: processes of the group that this is one of.
        model_processes: of them, those that share one model; the rest are replicas.
        option: what sets `model_processes`, for messages.
        timeout_seconds: how long a rank waits for others; None: parallel.timeout_seconds.

    Raises:
        UserError: there is no such checkpoint, or the model cannot be split over the processes.
    """
    config = config_of(path, model_processes, option)
    launch = Launch.from_environment() if processes > 1 else Launch(0, 1, 0, 1)
    if launch.world_size != processes:
        raise UserError(f"--processes: {processes} is not the world size, {launch.world_size}")
    parallel = config.parallel
    if timeout_seconds is not None:
        parallel = parallel.model_copy(update={"timeout_seconds": timeout_seconds})
    with start(parallel, config.training, launch) as runtime:
        source = load(path, config, runtime, step)
        for remark in source.remarks if runtime.is_main else ():
            print(remark, file=sys.stderr)
        yield source, runtime


def config_of(path: Path, processes: int = 1, option: str = "--processes") -> RunConfig:
    """The configuration of a run, a checkpoint or a Hugging Face folder.

    Changed for one replica of the model, on GPUs if there are and the run did not set device: cpu,
    and with the kernels that are installed here.

    Args:
        path: folder of a run or a checkpoint, or a Hugging Face folder.
        processes: ranks that share the model: pipeline stages, of the run's tensor-parallel size
            if it divides them.
        option: what sets `processes`, for messages.

    Raises:
        UserError: the folder is none of them, its model is not supported, or it has fewer blocks
            than there would be stages.
    """
    config = _saved_config(path)
    device = "cpu" if config.training.device == "cpu" else "auto"
    tensor = config.parallel.tensor if processes % config.parallel.tensor == 0 else 1
    stages = processes // tensor
    if stages > config.model.blocks:
        raise UserError(
            f"{option}: {processes} would be {stages} pipeline stages, and the model has "
            f"{count(config.model.blocks, 'block')}; give at most {config.model.blocks * tensor}"
        )
    return config.model_copy(
        update={
            "parallel": ParallelConfig(
                tensor=tensor, pipeline=stages, timeout_seconds=config.parallel.timeout_seconds
            ),
            "kernels": KernelsConfig(triton=config.kernels.triton),
            "training": config.training.model_copy(update={"threads": 0, "device": device}),
        }
    )


def _saved_config(path: Path) -> RunConfig:
    """The configuration as the folder has it."""
    if is_checkpoint(path):
        return load_config(path / CONFIG)
    return open_folder(path).config if is_hugging_face(path) else saved_config(path)


def load(path: Path, config: RunConfig, runtime: Runtime, step: int | None = None) -> Source:
    """Build the model and load its weights, on one rank or several.

    Args:
        path: folder of a run or a checkpoint, or a Hugging Face folder.
        config: the result of `config_of`.
        runtime: this rank's place.
        step: see `find_checkpoint`.

    Raises:
        UserError: there is no valid checkpoint, or its tokenizer is missing.
    """
    if is_hugging_face(path):
        return _load_folder(path, config, runtime, step)
    model: nn.Module | None = None
    while True:
        before = folder.steps(path)
        try:
            found = find_checkpoint(path, step, runtime)
            assert found.path is not None
            place = tokenizer_path(path, found.path, found, config)
            tokenizer, template = open_tokenizer(place), template_beside(place.parent)
            if model is None:
                (model,) = build_model(config, runtime)
            state.load_weights(found.path, runtime, [model])
        except (UserError, OSError):
            # A running training may have removed this checkpoint meanwhile. Several ranks might
            # not see it together.
            if runtime.launch.world_size > 1 or folder.steps(path) == before:
                raise
            continue
        step = found.state["step"]
        return Source(config, model.eval(), tokenizer, found.remarks, step, template)


def _load_folder(path: Path, config: RunConfig, runtime: Runtime, step: int | None) -> Source:
    """As `load`, of a Hugging Face folder."""
    if step is not None:
        raise UserError(
            f"--step: {path} is a Hugging Face folder, which has no steps",
            reported=not runtime.is_main,
        )
    folder = open_folder(path)
    tokenizer = open_tokenizer(path / folder.tokenizer[0])
    if tokenizer.vocab_size > config.data.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, and the model's vocab_size "
            f"is {config.data.vocab_size}",
            reported=not runtime.is_main,
        )
    (model,) = build_model(config, runtime)
    state.load_weights_from(path, folder.reader(), runtime, [model])
    return Source(config, model.eval(), tokenizer, (), template=template_beside(path))


def find_checkpoint(path: Path, step: int | None, runtime: Runtime) -> ResumePoint:
    """A checkpoint, read and checked; collective over all ranks.

    Args:
        path: folder of a run or a checkpoint.
        step: of a run's checkpoint; None: the newest valid one.
        runtime: this rank's place.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if is_hugging_face(path):
        raise UserError(
            f"{path} is a Hugging Face folder, not a run; create a run from it with `keel import`",
            reported=not runtime.is_main,
        )
    if step is None:
        found = checked(path, runtime) if is_checkpoint(path) else newest_good(path, runtime)
        if found.path is None:
            raise UserError(
                f"{path} has no complete checkpoint; train the run first",
                reported=not runtime.is_main,
            )
        return found
    named, problem = folder.step_folder(path, step), None
    if is_checkpoint(path):
        problem = f"--step: {path} is a checkpoint; name the run's folder, or no step"
    elif not named.is_dir():
        there = ", ".join(map(str, folder.steps(path))) or "none"
        problem = f"--step: there is no {named}; there are: {there}"
    if problem is not None:
        raise UserError(problem, reported=not runtime.is_main)
    return checked(named, runtime)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, not a run's."""
    return (path / MANIFEST).is_file()


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is a Hugging Face folder, not a run's or a checkpoint."""
    return (path / HUGGING_FACE).is_file() and not (path / CONFIG).is_file()


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
