"""Writes a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.checkpoint.weights import Weights
from keel_megatron.config.run import RunConfig
from keel_megatron.huggingface.card import card
from keel_megatron.huggingface.configuration import CONFIG, REMOTE, to_json
from keel_megatron.huggingface.folder import write_weights
from keel_megatron.huggingface.naming import is_llama, parameters
from keel_megatron.huggingface.new_folder import new_folder, require_space
from keel_megatron.huggingface.tokenizer import Files
from keel_megatron.tracking.metrics import iterate_metrics

DType = Literal["fp32", "bf16"]
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
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


def write_folder(
    out: Path,
    origin: Origin,
    tokenizer: Files,
    ends: Sequence[int],
    dtype: DType,
    say: Callable[[str], None],
) -> None:
    """Write a checkpoint as a Hugging Face folder, one parameter in memory at a time.

    Args:
        out: the folder.
        origin: what is exported.
        tokenizer: its tokenizer's files.
        ends: the token that ends a document; then others at which generation ends.
        dtype: of the weights; norm weights are fp32 in any case.
        say: called with progress messages.

    Raises:
        UserError: the folder cannot be written, the checkpoint cannot be read, or its residual
            rule cannot be exported.
    """
    config = origin.config
    rows = list(parameters(config.model, config.data.vocab_size))
    count = parameter_count(config.model, config.data.vocab_size)
    size = count * DTYPES[dtype].itemsize
    with new_folder(out) as partial:
        require_space(partial, out, size)
        say(f"writing {count:,} parameters ({size / 1e9:.3g} GB) to {out}")
        for name, content in (_small_files(origin, ends, dtype) | tokenizer.content).items():
            (partial / name).write_bytes(content)
        read = Weights(origin.checkpoint).read
        write_weights(partial, rows, read, DTYPES[dtype], progress=_reporter(size, say))


def _small_files(origin: Origin, ends: Sequence[int], dtype: DType) -> dict[str, bytes]:
    """All files but the weights and the tokenizer's, by name."""
    config = origin.config
    metrics = iterate_metrics(origin.metrics)
    packages = origin.state.get("packages", {})
    eod = ends[0]
    generation = {"eos_token_id": [*ends] if len(ends) > 1 else eod, "pad_token_id": eod}
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
