"""The sequences that are measured: the run's own validation, or a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from keel_megatron.config.run import RunConfig
from keel_megatron.data.dataset import open_dataset
from keel_megatron.data.index_files import open_sequences
from keel_megatron.studies.redundancy.text import Text, given_text, validation_text
from tests.datasets import VOCABULARY, made_up, write_dataset
from tests.settings import small_config

LENGTH = 16


class Letters:
    """A tokenizer: a token a character."""

    eod, vocab_size = 0, VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def blend(folder: Path, **overrides: object) -> tuple[RunConfig, dict[str, dict[str, str]]]:
    """A run on two sources of which one has three quarters of the samples, and its state."""
    sources = {"a": [made_up(60, 0)], "b": [made_up(60, 1)]}
    place = write_dataset(folder / "dataset", sources, weights={"a": 3.0, "b": 1.0})
    config = small_config(
        data__dataset=str(place),
        data__cache_dir=str(folder / "cache"),
        data__seq_length=LENGTH,
        data__vocab_size=VOCABULARY,
        **overrides,
    )
    return config, {"data": {"fingerprint": open_dataset(place, config.data).fingerprint}}


def text_of(folder: Path, tokens: int | None, seed: int = 0, **overrides: object) -> Text:
    config, state = blend(folder, **overrides)
    text = validation_text(config, state, tokens, seed)
    assert text is not None
    return text


@pytest.mark.parametrize("masks", [False, True])
def test_a_blends_sources_count_by_their_shares(tmp_path: Path, masks: bool) -> None:
    text = text_of(tmp_path, 8 * LENGTH, data__document_masks=masks)
    assert text.sequences == 8
    mask, documents = text.batch.loss_mask, text.batch.documents
    assert (mask is not None, documents is not None) == (masks, masks)
    counted = torch.full((8,), LENGTH) if mask is None else mask.sum(1)
    shares = torch.tensor(text.weights) * counted
    assert shares[:6].sum().item() == pytest.approx(0.75)
    assert shares[6:].sum().item() == pytest.approx(0.25)
    if mask is not None:
        assert counted.min() < LENGTH


def test_it_is_the_runs_validation_in_its_order(tmp_path: Path) -> None:
    config, state = blend(tmp_path)
    assert config.data.dataset is not None
    dataset = open_dataset(config.data.dataset, config.data)
    own = open_sequences(dataset, dataset.sources[0], "validation", LENGTH, 3, tmp_path / "cache")
    text = validation_text(config, state, 4 * LENGTH, 3)
    assert text is not None
    for number in range(3):
        assert text.batch.tokens is not None
        assert text.batch.tokens[number].tolist() == own.read(number).tokens[:-1].tolist()
    other = validation_text(config, state, 4 * LENGTH, 4)
    again = validation_text(config, state, 4 * LENGTH, 3)
    assert other is not None
    assert again is not None
    assert again.digest == text.digest != other.digest
    assert validation_text(config, {"data": {"fingerprint": "0" * 64}}, None, 3) is None


def test_a_part_has_everything_of_its_sequences(tmp_path: Path) -> None:
    text = text_of(tmp_path, None, data__document_masks=True)
    part = text.part(2, 5)
    for name in ("tokens", "labels", "loss_mask", "documents"):
        assert torch.equal(getattr(part, name), getattr(text.batch, name)[2:5])


def test_a_file_is_one_document(tmp_path: Path) -> None:
    config, _state = blend(tmp_path)
    path = tmp_path / "text"
    path.write_text("".join(chr(65 + n % 26) for n in range(70)))
    text = given_text(config, path, Letters(), None)  # type: ignore[arg-type]
    assert text.sequences == 4
    assert text.batch.tokens is not None
    assert text.batch.labels is not None
    assert torch.equal(text.batch.tokens[:, 1:], text.batch.labels[:, :-1])
    assert text.batch.tokens[1, 0] == text.batch.labels[0, -1]
    assert sum(text.weights) * LENGTH == pytest.approx(1.0)
