"""`data`: the text and how it becomes sequences."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from keel_megatron.config.base import Section, TextPath


class DataConfig(Section):
    """Text files, the tokenizer trained on them, and the sequences cut from them."""

    text: tuple[TextPath, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Text files or folders to train on (one path or a list); "
            "null = the demo corpus, the sources of Python's standard library."
        ),
    )
    seq_length: int = Field(gt=0, description="Tokens of a training sequence.")
    vocab_size: int = Field(
        ge=320, description="Size of the SentencePiece vocabulary (256 of them are raw bytes)."
    )
    tokenizer: TextPath | None = Field(
        default=None,
        description="A SentencePiece model to use instead of one trained on the text.",
    )
    allow_lossy_tokenizer: bool = Field(
        default=False,
        description="Take a data.tokenizer that loses more than 0.1 % of the text's characters.",
    )
    validation_fraction: float = Field(
        default=0.02,
        gt=0.0,
        lt=0.5,
        description="Share of the documents (of a single file: of its text) kept for validation; "
        "at least one document.",
    )
    cache: TextPath = Field(
        default=Path("data"),
        description="Folder of prepared data: tokenizers and indexed tokens, by content.",
    )

    @field_validator("text", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        """Accept a single path where a list is meant."""
        if isinstance(value, (str, Path)):
            return (value,)
        return tuple(value) if isinstance(value, list) else value
