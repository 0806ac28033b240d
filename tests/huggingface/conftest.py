from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from keel_megatron.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A SentencePiece model of 512 pieces, trained on a module's source."""
    return train_tokenizer([Path(argparse.__file__).read_text()], 512)
