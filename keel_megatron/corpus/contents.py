"""The content of all source files by hash, and the fingerprint of the dataset made from them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from keel_megatron.config.data import DataConfig
from keel_megatron.config.reading import LARGE, parse_json, read_small
from keel_megatron.corpus.documents import Source, SourceFile
from keel_megatron.corpus.find import Listing
from keel_megatron.corpus.readers.streams import opened, unreadable
from keel_megatron.data.chat.templates import find_template
from keel_megatron.data.manifest import FORMAT
from keel_megatron.data.tokenizer import open_tokenizer
from keel_megatron.runtime.cores import available_cores
from keel_megatron.runtime.files import write_whole

Contents = dict[str, dict[str, list[Any]]]
"""Size and SHA-256 of each file, by source and name."""

_LISTINGS: Final = ".listings"
_BLOCK = 1 << 20
_AT_ONCE = 256
_SECONDS_BETWEEN_LINES = 5.0


def hash_files(sources: Iterable[Source], say: Callable[[str], None]) -> Contents:
    """Hash all source files, on all cores.

    Contents are hashed, not times: a copy on another machine has the same fingerprint.

    Raises:
        UserError: a file cannot be read, or changed since it was found.
    """
    sources = tuple(sources)
    total = sum(source.size for source in sources)
    done, said = 0, time.monotonic()
    found: Contents = {}
    with ThreadPoolExecutor(available_cores()) as threads:
        for source in sources:
            records = found[source.name] = {}
            for start in range(0, len(source.files), _AT_ONCE):  # each has a future, of 2 KB
                files = source.files[start : start + _AT_ONCE]
                for file, digest in zip(files, threads.map(_sha256, files), strict=True):
                    records[file.name] = [file.size, digest]
                    done += file.size
                    if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                        said = time.monotonic()
                        say(f"hashed {done / 1e6:,.0f} of {total / 1e6:,.0f} MB of source files")
    return found


def sources_sha256(source: Source, contents: Contents) -> str:
    """SHA-256 of names, sizes and SHA-256 of a source's files, in order."""
    records = contents[source.name]
    return _sha256_of([file.name, *records[file.name]] for file in source.files)


def fingerprint_of(data: DataConfig, sources: Iterable[Source], contents: Contents) -> str:
    """SHA-256 of everything that determines the tokens of a dataset.

    Raises:
        UserError: data.tokenizer cannot be read.
    """
    parts: dict[str, Any] = {
        "format": FORMAT,
        "sources": [
            {
                "name": source.name,
                "text_key": source.text_key,
                "files": sources_sha256(source, contents),
                "kinds": _sha256_of([file.kind, file.part] for file in source.files),
            }
            for source in sources
        ],
        "tokenizer": given_tokenizer(data),
        "vocab_size": data.vocab_size,
        "validation_fraction": data.validation_fraction,
        "on_bad_record": data.on_bad_record,
    }
    parts |= _of_chat(data)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _of_chat(data: DataConfig) -> dict[str, str]:
    """What determines the tokens of conversations; nothing without any.

    Raises:
        UserError: the chat template cannot be read.
    """
    if not data.has_chat:
        return {}
    return {"chat_template": find_template(data.chat_template, data.tokenizer).sha256}


def given_tokenizer(data: DataConfig) -> str | None:
    """SHA-256 of data.tokenizer as the dataset keeps it; None if one is to be trained.

    Raises:
        UserError: it cannot be read.
    """
    if data.tokenizer is None:
        return None
    return hashlib.sha256(open_tokenizer(data.tokenizer).file_content()).hexdigest()


def remembered(data: DataConfig, listing: Listing) -> str | None:
    """The fingerprint of earlier, if no file has changed its size or modification time since."""
    try:
        found = parse_json(read_small(_memo(data, listing), LARGE))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and len(found) == 64 else None


def remember(data: DataConfig, listing: Listing, fingerprint: str) -> None:
    """Keep the fingerprint for `remembered`, if the cache can be written."""
    path = _memo(data, listing)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"fingerprint": fingerprint}))
    except OSError:
        pass


def _memo(data: DataConfig, listing: Listing) -> Any:
    parts = {
        "listing": listing.key(),
        "tokenizer": given_tokenizer(data),
        "vocab_size": data.vocab_size,
        "validation_fraction": data.validation_fraction,
        "on_bad_record": data.on_bad_record,
        "format": FORMAT,
        **_of_chat(data),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return data.cache_dir / _LISTINGS / key[:32]


def _sha256_of(lines: Iterable[list[Any]]) -> str:
    """SHA-256 of lines of JSON, made one by one, as there may be millions."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def _sha256(file: SourceFile) -> str:
    with opened(file) as stream:
        try:
            digest = hashlib.sha256()
            while block := stream.read(_BLOCK):
                digest.update(block)
            return digest.hexdigest()
        except OSError as error:
            raise unreadable(file, error) from error
