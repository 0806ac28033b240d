"""data.json: what a dataset folder contains.

A dataset folder is complete, does not depend on its place, and is never changed once built:

    data.json                    this file's content, a `Manifest`
    sources.json                 size and SHA-256 of each source file, by source and name
    tokenizer.model              or tokenizer.json
    shards/SOURCE-00000.bin      Megatron-core's indexed tokens; every document ends with `eod`
    shards/SOURCE-00000.idx
    shards/SOURCE-00000.npy      int64: the shard's documents held out for validation, ascending

of chat sources also:

    chat_template.jinja          the template of their conversations
    shards/SOURCE-00000.mask     uint8: for each token 1 if it counts in the loss, else 0
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field

from keel_megatron.config.section import Section

FORMAT: Final = 3
MANIFEST = "data.json"
SOURCES = "sources.json"
SHARDS = "shards"
CHAT: Final = "chat"
"""`SourceRecord.format` of conversations."""


class FileRecord(Section):
    """Identity of a file of the dataset."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    mtime_ns: int
    """Modification time when it was hashed; a file with another one is hashed again."""


class TokenizerRecord(Section):
    """The dataset's tokenizer."""

    file: Literal["tokenizer.model", "tokenizer.json"]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    given: bool
    """Whether it is data.tokenizer; otherwise it was trained on the sources."""
    vocab_size: int = Field(gt=0)
    eod: int = Field(ge=0)
    encoder: str
    """What encoded the text, with its version and the sample on which its tokens were equal."""
    lost: float = Field(ge=0.0, le=1.0)
    """Share of a sample's characters that it loses."""


class Shard(Section):
    """Indexed tokens: a .bin and .idx pair."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """File name without suffix, in `shards/`; of an external shard, that of its prefix."""
    external: bool = False
    """Used in place: .bin and .idx lie outside of the folder, where data.sources says."""
    part: Literal["both", "train", "validation"] = "both"
    """both: training documents, but for those listed in the .npy file."""
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    held_out_documents: int = Field(default=0, ge=0)
    held_out_tokens: int = Field(default=0, ge=0)
    loss_tokens: int | None = Field(default=None, ge=0)
    """Of a chat source: tokens that count in the loss, those of held-out documents included."""
    files: dict[Literal["bin", "idx", "npy", "mask"], FileRecord]


class Skipped(Section):
    """Files or records that were not taken, for one reason."""

    reason: str
    suffix: str = ""
    """Of the files, such as `.csv`; empty: none, or records."""
    count: int
    bytes: int
    first: str
    """The first one: its path, and line or row."""


class SourceRecord(Section):
    """One source: its shards and counts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    weight: float | None
    """As configured when it was built; None: by number of tokens."""
    format: str
    text_key: str
    files: int = Field(ge=0)
    bytes: int = Field(ge=0)
    """Of the source files, as stored."""
    characters: int = Field(ge=0)
    """Of the text; 0 for tokens used in place."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of names, sizes and SHA-256 of all files, in order."""
    shards: tuple[Shard, ...]
    skipped: tuple[Skipped, ...] = ()
    bad_records: Skipped | None = None

    @property
    def is_chat(self) -> bool:
        """Whether its documents are conversations, of which some tokens count in the loss."""
        return self.format == CHAT

    def documents(self, part: Literal["train", "validation"]) -> int:
        """Number of documents of a part."""
        return self._count(part, "documents")

    def tokens(self, part: Literal["train", "validation"]) -> int:
        """Number of tokens of a part, ends of documents included."""
        return self._count(part, "tokens")

    def _count(self, part: str, what: str) -> int:
        total = 0
        for shard in self.shards:
            held_out: int = getattr(shard, f"held_out_{what}")
            if shard.part == "both":
                total += getattr(shard, what) - held_out if part == "train" else held_out
            elif shard.part == part:
                total += getattr(shard, what)
        return total


class Manifest(Section):
    """Content of data.json."""

    format: Literal[3] = 3
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of everything that determines the tokens: the sources' content, the tokenizer, the
    split; not of paths, times or weights."""
    tokenizer: TokenizerRecord
    chat_template: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of chat_template.jinja; None: there is no chat source."""
    validation_fraction: float
    unigram_entropy: float
    """Of the training tokens of all sources that count in the loss, nats per token."""
    sources: tuple[SourceRecord, ...] = Field(min_length=1)
    versions: dict[str, str]
    """Packages that built it."""

    def identity(self) -> dict[str, Any]:
        """What must not change when a run resumes; saved in its checkpoints."""
        return {
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.sha256,
            "shards": {
                f"{source.name}/{shard.name}.{end}": {
                    "bytes": record.bytes,
                    "sha256": record.sha256,
                }
                for source in self.sources
                for shard in source.shards
                for end, record in shard.files.items()
            },
        }
