"""Writes a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.checkpoint.folder import sync
from keel_megatron.checkpoint.weights import Weights
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.huggingface.card import card
from keel_megatron.huggingface.configuration import CONFIG, REMOTE, to_json
from keel_megatron.huggingface.folder import write_weights
from keel_megatron.huggingface.naming import is_llama, parameters
from keel_megatron.huggingface.tokenizer import Files
from keel_megatron.tracking.metrics import iterate_metrics

DType = Literal["fp32", "bf16"]
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES: Final = {"fp32": "float32", "bf16": "bfloat16"}
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Origin:
    """What is exported."""

    config: RunConfig
    checkpoint: Path
    state: dict[str, Any]
    """Content of the checkpoint's state.json."""
    metrics: Path
    """The run's metrics.jsonl; need not exist."""


def check_target(out: Path) -> None:
    """See that a folder can be written: it, and OUT.partial, must not exist; it may be empty.

    Raises:
        UserError: it cannot.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"--out: {out} exists and is not an empty folder; name another")
    if os.path.lexists(_partial(out)):
        raise UserError(
            f"--out: {_partial(out)} exists, left by an export that was killed or is at work; "
            "remove it, or name another folder"
        )


def write_folder(
    out: Path,
    origin: Origin,
    tokenizer: Files,
    eod: int,
    dtype: DType,
    say: Callable[[str], None],
) -> None:
    """Write a checkpoint as a Hugging Face folder, one parameter in memory at a time.

    The files are written into OUT.partial, which is renamed at the end; an error removes it.

    Args:
        out: the folder; `check_target` has accepted it.
        origin: what is exported.
        tokenizer: its tokenizer's files.
        eod: the token that ends a document.
        dtype: of the weights; norm weights are fp32 in any case.
        say: called with progress messages.

    Raises:
        UserError: the folder cannot be written, the checkpoint cannot be read, or its residual
            rule cannot be exported.
    """
    config = origin.config
    rows = list(parameters(config.model, config.data.vocab_size))
    count = parameter_count(config.model, config.data.vocab_size)
    size = count * _DTYPES[dtype].itemsize
    partial = _partial(out)
    with _writing(out, partial):
        free = shutil.disk_usage(partial).free
        if size > free:
            raise UserError(
                f"--out: {out} needs {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there"
            )
        say(f"writing {count:,} parameters ({size / 1e9:.3g} GB) to {out}")
        for name, content in (_small_files(origin, eod, dtype) | tokenizer.content).items():
            (partial / name).write_bytes(content)
        read = Weights(origin.checkpoint).read
        write_weights(partial, rows, read, _DTYPES[dtype], progress=_reporter(size, say))
        _sync_files(partial)
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
        sync(out.resolve().parent)


def _small_files(origin: Origin, eod: int, dtype: DType) -> dict[str, bytes]:
    """All files but the weights and the tokenizer's, by name."""
    config = origin.config
    metrics = iterate_metrics(origin.metrics)
    packages = origin.state.get("packages", {})
    generation = {"eos_token_id": eod, "pad_token_id": eod}
    files = {
        CONFIG: _json(to_json(config, _NAMES[dtype], eod)),
        "generation_config.json": _json(generation),
        "README.md": card(config, origin.state["step"], metrics, _NAMES[dtype], packages).encode(),
    }
    if not is_llama(config.model):
        code = Path(__file__).parent / "remote"
        files |= {name: (code / name).read_bytes() for name in REMOTE}
    return files


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def _writing(out: Path, partial: Path) -> Iterator[None]:
    """Make the folder to write into; an error removes it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from error
    try:
        yield
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync(folder)


def _reporter(size: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Reports progress at intervals."""
    written, said = 0, time.monotonic()

    def add(count: int) -> None:
        nonlocal written, said
        written += count
        if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            say(f"{written / 1e9:.1f} of {size / 1e9:.1f} GB written")

    return add
