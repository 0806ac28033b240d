"""The sequences on which models are measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keel_megatron.config.run import RunConfig
from keel_megatron.data.batches import Batch, collate
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.index_files import open_sequences
from keel_megatron.data.sequences import Sequence
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError
from keel_megatron.inference.sample_text import own_dataset

MOST = 65_536
"""Tokens by default at most."""


@dataclass(frozen=True)
class Text:
    """Sequences, and how much each counts."""

    batch: Batch
    """All of them, [n, s]."""
    weights: tuple[float, ...]
    """The loss is the sum of all sequences' summed losses times these."""
    what: str
    """Where they are from."""

    @property
    def sequences(self) -> int:
        """How many."""
        return len(self.weights)

    @property
    def length(self) -> int:
        """Tokens of each, s."""
        assert self.batch.tokens is not None
        return self.batch.tokens.size(1)

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens, which of them count, and where documents end."""
        found = hashlib.sha256()
        batch = self.batch
        for part in (batch.tokens, batch.labels, batch.loss_mask, batch.documents):
            found.update(b"-" if part is None else part.numpy().tobytes())
        return found.hexdigest()

    def part(self, first: int, stop: int) -> Batch:
        """Some of the sequences."""
        batch, rows = self.batch, slice(first, stop)
        parts = (batch.tokens, batch.labels, batch.loss_mask, batch.documents)
        tokens, labels, mask, documents = (None if x is None else x[rows] for x in parts)
        return Batch(tokens, labels, mask, documents=documents)


def validation_text(
    config: RunConfig, state: dict[str, Any], tokens: int | None, seed: int
) -> Text | None:
    """The beginning of a run's validation set, in the order of a run of that seed.

    A blend's sources have as many sequences as their shares of the samples, and count by their
    shares, as in the run's own validation.

    Args:
        config: the run.
        state: content of its checkpoint's state.json.
        tokens: how many; None: those of the run's validations, up to `MOST`.
        seed: of the order of the sequences.

    Returns:
        The sequences; None if the dataset is not found.

    Raises:
        UserError: so few tokens are no sequence.
    """
    dataset = own_dataset(config, state)
    if dataset is None:
        return None
    length, most = config.data.seq_length, config.training.validation_sequences
    wanted = min(most, max(1, MOST // length)) if tokens is None else _wanted(tokens, length)
    total = sum(dataset.quotas.values())
    sequences: list[Sequence] = []
    weights: list[float] = []
    for source in dataset.sources:
        held_out = open_sequences(
            dataset, source, "validation", length, seed, config.data.cache_dir
        )
        share = dataset.quotas[source.name] / total
        count = min(len(held_out), max(1, round(wanted * share)))
        read = [held_out.read(number) for number in range(count)]
        counted = _collated(config, read).loss_mask
        whole = count * length if counted is None else int(counted.sum())
        sequences += read
        weights += [share / whole] * count
    batch = _collated(config, sequences)
    return Text(batch, tuple(weights), f"the validation set of {dataset.folder}")


def given_text(
    config: RunConfig,
    path: Path,
    tokenizer: Tokenizer | HuggingFaceTokenizer,
    tokens: int | None,
) -> Text:
    """A file's text, as one document.

    Args:
        config: the run.
        path: UTF-8 text.
        tokenizer: the run's.
        tokens: how many; None: all, up to `MOST`.

    Raises:
        UserError: the file cannot be read, or its text is no sequence.
    """
    length = config.data.seq_length
    try:
        encoded = tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--text: {path} cannot be read: {reason}") from error
    wanted = max(1, MOST // length) if tokens is None else _wanted(tokens, length)
    count = min(wanted, (len(encoded) - 1) // length)
    if count < 1:
        raise UserError(
            f"--text: {path} has {len(encoded):,} tokens, fewer than the {length + 1:,} of one "
            "sequence (data.seq_length + 1); give a longer text"
        )
    rows = np.asarray(encoded[: count * length + 1], dtype=np.int64)
    read = [
        Sequence(rows[start : start + length + 1], (length + 1,))
        for start in range(0, count * length, length)
    ]
    return Text(_collated(config, read), (1 / (count * length),) * count, str(path))


def _collated(config: RunConfig, sequences: list[Sequence]) -> Batch:
    data = config.data
    return collate(
        sequences,
        documents=data.document_masks,
        loss_mask=data.masks_eod_loss,
        counts=any(sequence.counts is not None for sequence in sequences),
    )


def _wanted(tokens: int, length: int) -> int:
    """Sequences of `--tokens`."""
    if tokens < length:
        raise UserError(
            f"--tokens: {tokens:,} must be at least {length:,}, one sequence (data.seq_length)"
        )
    return tokens // length
