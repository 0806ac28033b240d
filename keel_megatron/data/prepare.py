"""Prepared data: a tokenizer and indexed tokens, created once per corpus and reused.

The folder is `data.cache_dir`/KEY, where KEY is a hash of everything that determines the data. It
is built under a temporary name and renamed, so it is complete or absent. A lock lets one process
build while others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel_megatron.config.reading import parse_json, read_small
from keel_megatron.config.run import RunConfig
from keel_megatron.data.corpus import (
    Corpus,
    Document,
    contents_fingerprint,
    describe_split,
    find_corpus,
    split,
)
from keel_megatron.data.fingerprint import (
    SOURCES,
    Sources,
    file_record,
    is_unchanged,
    refuse_other_files,
    refuse_other_text,
)
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole

if TYPE_CHECKING:
    from keel_megatron.data.tokenizer import Tokenizer

FORMAT = 2
_LOCK = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SAMPLE = 1_000_000
"""Number of characters on which a given tokenizer is tested."""
_LOST_AT_MOST = 0.001
TOKENIZER = "tokenizer.model"
_TRAIN, _VALIDATION, _MANIFEST = "train", "validation", "data.json"
_FILES = {SOURCES, TOKENIZER} | {
    f"{p}.{end}" for p in (_TRAIN, _VALIDATION) for end in ("bin", "idx")
}


@dataclass(frozen=True)
class PreparedData:
    """Location and properties of a run's tokens."""

    folder: Path
    fingerprint: str
    """SHA-256 of everything that determines the tokens."""
    corpus: str
    """SHA-256 of the text."""
    tokenizer: str | None
    """SHA-256 of data.tokenizer, if set."""
    unigram_entropy: float
    """Unigram entropy of the training tokens, nats per token."""
    train_tokens: int
    validation_tokens: int
    train_documents: int
    validation_documents: int
    files: dict[str, dict[str, Any]]
    """Size, SHA-256 and modification time of each data file."""

    @property
    def tokenizer_path(self) -> Path:
        """The SentencePiece model."""
        return self.folder / TOKENIZER

    @property
    def train_prefix(self) -> Path:
        """Training tokens: this path with .bin and .idx."""
        return self.folder / _TRAIN

    @property
    def validation_prefix(self) -> Path:
        """Validation tokens: this path with .bin and .idx."""
        return self.folder / _VALIDATION

    def identity(self) -> dict[str, Any]:
        """What must not change when a run resumes; saved in its checkpoints."""
        return {
            "fingerprint": self.fingerprint,
            "corpus": self.corpus,
            "tokenizer": self.tokenizer,
            "files": {
                name: {"bytes": record["bytes"], "sha256": record["sha256"]}
                for name, record in self.files.items()
            },
        }


def prepare(
    config: RunConfig, log: Callable[[str], None], expected: dict[str, Any] | None = None
) -> PreparedData:
    """Create a run's tokenizer and tokens, or reuse existing ones.

    Args:
        config: the run; its `data` section matters.
        log: called with progress messages.
        expected: the identity that the data must have; None: any.

    Raises:
        UserError: the data, tokenizer or cache does not match the configuration or the expected
            identity.
    """
    log = _tolerant(log)
    corpus = find_corpus(config.data.text, log)
    sources = corpus.contents()
    origin = _origin(config, sources)
    if expected is not None:
        refuse_other_text(expected, origin, config.data.cache_dir, sources)
    folder = config.data.cache_dir / origin["fingerprint"][:16]
    prepared = _find(folder, origin, lambda _text: None)
    if (
        prepared is not None
    ):  # no lock: another user may have created it, and this one may have read access only
        log(f"reusing the prepared data in {folder}")
    else:
        prepared = _made(config, corpus, sources, folder, origin, log)
    if expected is not None:
        refuse_other_files(expected, prepared.identity(), folder)
    _check_length(config, prepared, len(corpus.files))
    return prepared


def _made(
    config: RunConfig,
    corpus: Corpus,
    sources: Sources,
    folder: Path,
    origin: dict[str, Any],
    log: Callable[[str], None],
) -> PreparedData:
    """Build the data, or wait for the process that builds it."""
    with _locked(config.data.cache_dir, folder.name, log):
        prepared = _find(folder, origin, log)
        if prepared is None:
            log(f"preparing {corpus.description}: {corpus.size / 1e6:.1f} MB")
            log(describe_split(corpus, config.data.validation_fraction))
            with _partial(folder) as partial:
                (partial / SOURCES).write_text(json.dumps(sources))
                prepared = _build(config, corpus, partial, folder, origin, log)
        else:
            log(f"reusing the prepared data in {folder}")
    return prepared


def _tolerant(log: Callable[[str], None]) -> Callable[[str], None]:
    """A log that ignores a closed output."""

    def say(text: str) -> None:
        with suppress(OSError):
            log(text)

    return say


def keep_tokenizer(data: PreparedData, run_folder: Path) -> Path:
    """Copy the tokenizer into a run's folder, so that inference does not need the prepared data.

    Returns:
        The copy.

    Raises:
        UserError: the folder cannot be written.
    """
    kept = run_folder / TOKENIZER
    try:
        write_whole(kept, data.tokenizer_path.read_bytes())
    except OSError as error:
        raise UserError(
            f"training.runs_dir: cannot write {error.filename or kept}: {error.strerror}"
        ) from error
    return kept


def _origin(config: RunConfig, sources: Sources) -> dict[str, Any]:
    """Fingerprint of everything that determines the data, and two of its parts."""
    data = config.data
    parts = {
        "format": FORMAT,
        "corpus": contents_fingerprint(sources),
        "vocab_size": data.vocab_size,
        "validation_fraction": data.validation_fraction,
        "tokenizer": _file_hash(data.tokenizer) if data.tokenizer else None,
    }
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return {
        "fingerprint": fingerprint,
        "corpus": parts["corpus"],
        "tokenizer": parts["tokenizer"],
    }


def _file_hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"data.tokenizer: {path} cannot be read: {error.strerror}") from error


@contextmanager
def _locked(cache: Path, name: str, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a folder in the cache; later processes wait, and log that they do."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Other users may write the cache: the name may be a link to another file, or a FIFO.
        with os.fdopen(os.open(cache / f".{name}.lock", _LOCK, 0o666), "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another process that prepares {cache / name}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {error.filename or cache}: {error.strerror}"
        ) from error


def _find(
    folder: Path, origin: Mapping[str, Any], log: Callable[[str], None]
) -> PreparedData | None:
    """The complete folder, or None if it is absent or was changed."""
    manifest = folder / _MANIFEST
    if folder.is_symlink() or manifest.is_symlink() or not manifest.is_file():
        return None
    try:
        content: dict[str, Any] = parse_json(read_small(manifest))
        prepared = PreparedData(folder=folder, **content)
        if prepared.files.keys() != _FILES or any(content[key] != origin[key] for key in origin):
            raise ValueError("other files, or of other texts")
        _check_types(prepared)
        changed = [
            name for name, file in prepared.files.items() if not _is_good(folder / name, file)
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        log(f"{manifest} was changed: preparing the data again")
        return None
    for name in changed[:1]:
        log(f"{folder / name} is missing or was changed: preparing the data again")
        return None
    return prepared


def _check_types(prepared: PreparedData) -> None:
    for name in ("train_tokens", "validation_tokens", "train_documents", "validation_documents"):
        if type(getattr(prepared, name)) is not int:
            raise TypeError(name)
    if type(prepared.unigram_entropy) is not float:
        raise TypeError("unigram_entropy")


def _is_good(path: Path, record: Mapping[str, Any]) -> bool:
    return not path.is_symlink() and is_unchanged(path, record)


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """A temporary folder next to `folder`, removed if building fails."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(
    config: RunConfig,
    corpus: Corpus,
    partial: Path,
    folder: Path,
    origin: dict[str, Any],
    log: Callable[[str], None],
) -> PreparedData:
    from keel_megatron.data.indexed import write_indexed
    from keel_megatron.data.tokenizer import Tokenizer

    training, validation = split(corpus, config.data.validation_fraction)
    (partial / TOKENIZER).write_bytes(_tokenizer_model(config, training, log))
    tokenizer = Tokenizer(partial / TOKENIZER)
    train = write_indexed(training(), tokenizer, partial / _TRAIN, log)
    held_out = write_indexed(validation(), tokenizer, partial / _VALIDATION, log)
    prepared = PreparedData(
        folder=folder,
        **origin,
        unigram_entropy=train.unigram_entropy,
        train_tokens=train.tokens,
        validation_tokens=held_out.tokens,
        train_documents=train.documents,
        validation_documents=held_out.documents,
        files={path.name: file_record(path) for path in sorted(partial.iterdir())},
    )
    _publish(partial, folder, prepared)
    log(f"{train.tokens:,} training and {held_out.tokens:,} validation tokens in {folder}")
    return prepared


def _tokenizer_model(
    config: RunConfig, training: Callable[[], Iterator[Any]], log: Callable[[str], None]
) -> bytes:
    from keel_megatron.data.tokenizer import Tokenizer, train_tokenizer

    given = config.data.tokenizer
    if given is not None:
        _check_tokenizer(config, Tokenizer(given), training, log)
        return given.read_bytes()
    log(f"training a tokenizer of {config.data.vocab_size} pieces")
    return train_tokenizer((document.text for document in training()), config.data.vocab_size)


def _check_tokenizer(
    config: RunConfig,
    tokenizer: Tokenizer,
    training: Callable[[], Iterator[Document]],
    log: Callable[[str], None],
) -> None:
    """Check that a given tokenizer has the right size and is lossless.

    Raises:
        UserError: its size differs, or it loses more than 0.1 % of a sample's characters.
    """
    data = config.data
    if tokenizer.vocab_size != data.vocab_size:
        raise UserError(
            f"data.vocab_size: {data.vocab_size} must be {tokenizer.vocab_size}, the size of "
            f"data.tokenizer = {data.tokenizer}"
        )
    size = lost = 0
    for document in training():
        text = document.text[: _SAMPLE - size]
        size, lost = size + len(text), lost + tokenizer.lost(text)
        if size >= _SAMPLE:
            break
    if not lost:
        return
    said = (
        f"data.tokenizer: {data.tokenizer} loses {lost / size:.2%} of the text's characters "
        f"({lost:,} of the first {size:,}): {'; '.join(tokenizer.losses()) or 'it encodes too few'}"
    )
    if lost <= _LOST_AT_MOST * size or data.allow_lossy_tokenizer:
        log(f"warning: {said}")
        return
    raise UserError(
        f"{said}. Use one trained with byte_fallback=true, normalization_rule_name=identity and "
        "remove_extra_whitespaces=false, or null to train one; or set "
        "data.allow_lossy_tokenizer to true"
    )


def _publish(partial: Path, folder: Path, prepared: PreparedData) -> None:
    content = asdict(prepared)
    del content["folder"]
    (partial / _MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    for path in partial.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _check_length(config: RunConfig, prepared: PreparedData, documents: int) -> None:
    """Check that there are seq_length + 1 tokens, enough for one sequence."""
    needed = config.data.seq_length + 1
    # With two documents, one is held out for any fraction.
    fraction = "" if documents == 2 else " or another data.validation_fraction"
    for side, tokens in (
        ("training", prepared.train_tokens),
        ("validation", prepared.validation_tokens),
    ):
        if tokens < needed:
            raise UserError(
                f"data.text: the {side} set has {tokens} tokens, fewer than the {needed} of one "
                f"sequence (data.seq_length + 1); use more data, a shorter data.seq_length"
                f"{fraction}"
            )
