"""Small tokenizers for tests, made once."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from keel_megatron.data.tokenizer import train_tokenizer

WORDS = "the cat sat on a mat and ran to see how many birds were there in that old tree by river"
SPECIAL = ("<|endoftext|>", "<pad>", "</s>")


def prose(characters: int, seed: int = 0) -> str:
    """English-like text."""
    import random

    numbers = random.Random(seed)
    words = WORDS.split()
    ends = (" ", " ", " ", " ", ", ", ". ", ".\n", "\n\n  ", " 12")
    text = ""
    while len(text) < characters:
        text += numbers.choice(words) + numbers.choice(ends)
    return text[:characters]


@cache
def sentencepiece_model() -> bytes:
    """A SentencePiece model of 400 pieces."""
    return train_tokenizer([prose(40_000), "def f(x):\n\treturn x\n" * 50], 400)


@cache
def _bytes_bpe() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [prose(40_000)],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return str(tokenizer.to_str())


def bytes_bpe() -> dict[str, Any]:
    """The content of a byte-level BPE tokenizer.json of 326 tokens, as GPT-2's."""
    parsed: dict[str, Any] = json.loads(_bytes_bpe())
    return parsed


def unigram(pieces: list[str], unknown: str = "<unk>") -> dict[str, Any]:
    """The content of a Unigram tokenizer.json whose vocabulary holds `</s>` as a piece."""
    vocabulary = [[unknown, 0.0], ["</s>", -1.0], *([piece, -5.0] for piece in pieces)]
    added = [
        {
            "id": 1,
            "content": "</s>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": False},
    }


def write_sentencepiece(folder: Path) -> Path:
    """The SentencePiece model as a file."""
    path = folder / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    return path


def write_json(folder: Path, content: dict[str, Any]) -> Path:
    """A tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path
