"""`data`: the training data, its tokenizer and its sequences."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from keel_megatron.config.section import Section, TextPath


class DataConfig(Section):
    """Training data, tokenizer and sequence length."""

    text: tuple[TextPath, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Training data: paths of text files or folders (one path or a list). null: the "
            "demo corpus, the sources of Python's standard library."
        ),
    )
    seq_length: int = Field(gt=0, description="Sequence length, in tokens.")
    vocab_size: int = Field(
        ge=320, description="Size of the SentencePiece vocabulary, including 256 byte tokens."
    )
    tokenizer: TextPath | None = Field(
        default=None,
        description="Path of a SentencePiece model. null: train one on the training data.",
    )
    allow_lossy_tokenizer: bool = Field(
        default=False,
        description=(
            "Accept a data.tokenizer that loses more than 0.1 % of the training data's characters."
        ),
    )
    validation_fraction: float = Field(
        default=0.02,
        gt=0.0,
        lt=0.5,
        description=(
            "Fraction of the documents kept for validation, at least one document. For a "
            "single file: fraction of its text."
        ),
    )
    cache_dir: TextPath = Field(
        default=Path("data"),
        description=("Folder of prepared data: tokenizers and indexed tokens, keyed by content."),
    )

    @field_validator("text", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        """Accept a single path in place of a list."""
        if isinstance(value, (str, Path)):
            return (value,)
        return tuple(value) if isinstance(value, list) else value
