"""`data`: the training data, its tokenizer and its sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from keel_megatron.config.section import Section, TextPath, one_or_many

Format = Literal["auto", "text", "jsonl", "parquet", "huggingface", "megatron", "chat"]


class SourceConfig(Section):
    """One source of training data, an entry of `data.sources`."""

    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Name in metrics and reports. null: the last part of the path.",
    )
    path: tuple[TextPath, ...] = Field(
        default=(),
        description="Files, folders or globs (one or a list); optional with data.dataset.",
    )
    weight: float | None = Field(
        default=None,
        gt=0.0,
        description=(
            "Share of the samples, relative to the other sources' weights. null for every source: "
            "by number of tokens."
        ),
    )
    format: Format = Field(
        default="auto",
        description=(
            "Format: text, jsonl, parquet, huggingface (a dataset folder on disk), megatron "
            "(prefix of a .bin and .idx pair, used in place) or chat (JSON lines of conversations, "
            "for supervised fine-tuning). auto: detect it from suffix and content, never chat. "
            "Text, jsonl and chat may be compressed (.gz, .zst)."
        ),
    )
    text_key: str = Field(
        default="text",
        min_length=1,
        description=(
            "Key or column of the text in a record. For chat, the key of the list of messages; "
            "default: messages."
        ),
    )
    validation: tuple[TextPath, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Files of this source's validation set. null: hold out data.validation_fraction."
        ),
    )

    _paths = field_validator("path", "validation", mode="before")(one_or_many)

    @model_validator(mode="before")
    @classmethod
    def _key_of_messages(cls, value: Any) -> Any:
        """The default of `text_key` for chat."""
        if isinstance(value, dict) and value.get("format") == "chat":
            return {"text_key": "messages", **value}
        return value


class DataConfig(Section):
    """Training data, tokenizer and sequence length."""

    text: tuple[TextPath, ...] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Training data, short form of data.sources with one source: files, folders or globs "
            "(one or a list). null: the demo corpus, the sources of Python's standard library."
        ),
    )
    sources: tuple[SourceConfig, ...] | None = Field(
        default=None,
        min_length=1,
        description="Training data: a list of sources, each with a path and a weight.",
    )
    dataset: TextPath | None = Field(
        default=None,
        description=(
            "Dataset folder to open, made by `keel data build`. null: the one in data.cache_dir "
            "that was built from data.text or data.sources."
        ),
    )
    build: Literal["auto", "never"] = Field(
        default="auto",
        description=(
            "Whether to build a missing dataset before training. auto: yes, on one machine. never: "
            "refuse to start. A run on several machines always needs an existing dataset."
        ),
    )
    on_bad_record: Literal["stop", "skip"] = Field(
        default="stop",
        description=(
            "Action on a damaged record when building a dataset. stop: end the build. skip: leave "
            "out the record and count it."
        ),
    )
    seq_length: int = Field(gt=0, description="Sequence length, in tokens.")
    document_masks: bool = Field(
        default=False,
        description="Restrict attention to one document if a sequence contains several.",
    )
    eod_mask_loss: bool | None = Field(
        default=None,
        description=(
            "Exclude from the loss the first token of a document that follows another one in a "
            "sequence. null: same as data.document_masks."
        ),
    )
    vocab_size: int = Field(
        ge=320,
        description="Vocabulary size. In a SentencePiece model, it includes 256 byte tokens.",
    )
    tokenizer: TextPath | None = Field(
        default=None,
        description=(
            "Path of a SentencePiece model, or of a Hugging Face tokenizer.json (file or folder). "
            "null: train a SentencePiece model on the training data."
        ),
    )
    chat_template: TextPath | None = Field(
        default=None,
        description=(
            "File with the Jinja chat template of chat sources. null: the template beside "
            "data.tokenizer (chat_template.jinja, or chat_template in tokenizer_config.json), "
            "otherwise that of Tulu 3, whose role names are plain text."
        ),
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
            "Fraction of each source's documents kept for validation, at least one document. For a "
            "single plain text file: fraction of its text."
        ),
    )
    cache_dir: TextPath = Field(
        default=Path("data"),
        description="Folder of built datasets and index files, keyed by content.",
    )

    _paths = field_validator("text", mode="before")(one_or_many)

    @field_validator("sources", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """Accept a list."""
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        """Check that the data's origin is given once, and that sources are complete."""
        given = [n for n in ("text", "sources", "dataset") if getattr(self, n) is not None]
        if "text" in given and len(given) > 1:
            raise ValueError(f"give one of data.{' and data.'.join(given)}")
        sources = self.sources or ()
        if self.dataset is None and any(not source.path for source in sources):
            raise ValueError("every entry of data.sources needs a path")
        if len({source.weight is None for source in sources}) > 1:
            raise ValueError("give every entry of data.sources a weight, or none")
        return self

    @property
    def has_chat(self) -> bool:
        """Whether a source has conversations; a dataset says so itself (`Dataset.has_masks`)."""
        return any(source.format == "chat" for source in self.sources or ())

    @property
    def has_loss_mask(self) -> bool:
        """Whether some tokens do not count in the loss, as far as the settings say."""
        return self.masks_eod_loss or self.has_chat

    @property
    def masks_eod_loss(self) -> bool:
        """`eod_mask_loss`, resolved."""
        return self.document_masks if self.eod_mask_loss is None else self.eod_mask_loss
