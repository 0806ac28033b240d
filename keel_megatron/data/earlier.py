"""Reads folders of prepared data of earlier versions (format 2), for runs that those began.

Such a folder holds train.bin, validation.bin, their indexes, and tokenizer.model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from keel_megatron.data.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    Shard,
    SourceRecord,
    TokenizerRecord,
)
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError

_TOKENIZER = "tokenizer.model"
_NAMES = {f"{p}.{end}" for p in ("train", "validation") for end in ("bin", "idx")} | {
    "sources.json",
    _TOKENIZER,
}


def is_earlier(identity: dict[str, Any] | None) -> bool:
    """Whether a checkpoint's identity of its data is one of an earlier version."""
    return identity is not None and "corpus" in identity and "files" in identity


def earlier_dataset(content: dict[str, Any], folder: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and the identity of such a folder, from the content of its data.json.

    Raises:
        UserError: the content is damaged.
    """
    try:
        files = {str(name): FileRecord(**record) for name, record in content["files"].items()}
        if files.keys() != _NAMES:
            raise ValueError("other files")
        identity = {
            "fingerprint": content["fingerprint"],
            "corpus": content["corpus"],
            "tokenizer": content["tokenizer"],
            "files": {
                name: {"bytes": record.bytes, "sha256": record.sha256}
                for name, record in files.items()
            },
        }
        return _manifest(content, files, folder), identity
    except (TypeError, KeyError, ValueError, AttributeError, OSError) as error:
        raise UserError(f"data.cache_dir: {folder / MANIFEST} is damaged ({error})") from error


def _manifest(content: dict[str, Any], files: dict[str, FileRecord], folder: Path) -> Manifest:
    if (folder / _TOKENIZER).is_symlink():
        raise ValueError(f"{_TOKENIZER} is a link")
    model = Tokenizer(folder / _TOKENIZER)
    source = SourceRecord(
        name="text",
        weight=None,
        format="text",
        text_key="text",
        files=0,
        bytes=0,
        characters=0,
        sha256=content["corpus"],
        shards=(_shard("train", content, files), _shard("validation", content, files)),
    )
    return Manifest(
        fingerprint=content["fingerprint"],
        tokenizer=TokenizerRecord(
            file="tokenizer.model",
            sha256=files[_TOKENIZER].sha256,
            given=content["tokenizer"] is not None,
            vocab_size=model.vocab_size,
            eod=model.eod,
            encoder="sentencepiece",
            lost=0.0,
        ),
        validation_fraction=0.0,
        unigram_entropy=content["unigram_entropy"],
        sources=(source,),
        versions={},
    )


def _shard(
    part: Literal["train", "validation"], content: dict[str, Any], files: dict[str, FileRecord]
) -> Shard:
    return Shard(
        name=part,
        part=part,
        documents=content[f"{part}_documents"],
        tokens=content[f"{part}_tokens"],
        files={"bin": files[f"{part}.bin"], "idx": files[f"{part}.idx"]},
    )
