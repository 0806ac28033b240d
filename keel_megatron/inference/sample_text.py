"""Real text to compare models and tokenizers on."""

from __future__ import annotations

import argparse
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from keel_megatron.config.run import RunConfig
from keel_megatron.data.dataset import Dataset, open_dataset
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.sequences import Documents
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError

_TOKENS = 50_000
_DOCUMENTS = 1000


def sample_text(
    config: RunConfig, state: dict[str, Any], tokenizer: Tokenizer | HuggingFaceTokenizer
) -> tuple[str, str]:
    """A text, and what it is: the run's validation text where its dataset is found.

    Otherwise a module of Python's standard library, which is what the demo trains on.

    Args:
        config: the run.
        state: content of its checkpoint's state.json.
        tokenizer: the run's.
    """
    with suppress(UserError):
        dataset = own_dataset(config, state)
        text = "" if dataset is None else _validation_text(dataset, tokenizer)
        if dataset is not None and text:
            return text, f"the validation text of {dataset.folder}"
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    return text, "a module of Python's standard library"


def own_dataset(config: RunConfig, state: dict[str, Any]) -> Dataset | None:
    """The dataset that a run was trained on; None if it is not there any more.

    Args:
        config: the run.
        state: content of its checkpoint's state.json.
    """
    fingerprint = str(state.get("data", {}).get("fingerprint"))
    folder = config.data.dataset or config.data.cache_dir / fingerprint[:16]
    with suppress(UserError):
        dataset = open_dataset(folder, config.data)
        if dataset.fingerprint == fingerprint:
            return dataset
    return None


def _validation_text(dataset: Dataset, tokenizer: Tokenizer | HuggingFaceTokenizer) -> str:
    """The beginning of the held-out documents of all sources."""
    parts = []
    for source in dataset.sources:
        documents, left = Documents(source, "validation"), _TOKENS // len(dataset.sources)
        lengths = documents.lengths()
        for number, length in islice(zip(documents.numbers, lengths, strict=True), _DOCUMENTS):
            tokens = documents.read(int(number), 0, min(int(length), left)).astype(np.int64)
            if tokens.size and int(tokens.max()) >= tokenizer.vocab_size:
                raise UserError(f"{dataset.folder} has tokens that its tokenizer does not have")
            parts.append(tokenizer.decode(tokens.tolist()))
            left -= len(tokens)
            if left <= 0:
                break
    return "\n".join(parts)
