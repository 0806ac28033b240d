"""One job of a build: reads its units and writes their tokens."""

from __future__ import annotations

import codecs
import io
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from keel_megatron.config.reading import read_small
from keel_megatron.config.section import Section
from keel_megatron.corpus import readers
from keel_megatron.corpus.cuts import Pieces, cuts_of
from keel_megatron.corpus.documents import Document, Unit
from keel_megatron.corpus.encoders import Encode, UnusableError, open_encoder
from keel_megatron.corpus.plan import JOBS, Job, Plan, read_units
from keel_megatron.corpus.readers import Tally
from keel_megatron.corpus.readers.streams import blocks
from keel_megatron.corpus.split import key_hash
from keel_megatron.corpus.writer import TokenWriter
from keel_megatron.data.chat.rendering import Messages
from keel_megatron.data.chat.tokens import ChatTokenizer, open_chat
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError
from keel_megatron.runtime.files import write_whole

_SECONDS_BETWEEN_REPORTS: Final = 0.5
_COMPRESSION: Final = 3
"""Characters per stored byte of compressed files and columns, about; for the progress."""


class Extreme(Section):
    """The document of a job with the smallest or largest hash."""

    hash: int
    document: int
    tokens: int


class Rejected(Section):
    """Records of one kind that were not taken."""

    count: int = 0
    bytes: int = 0
    first: str = ""


class JobResult(Section):
    """What a job wrote; its file exists once the job is complete."""

    documents: int = 0
    """Of a part that does not end its document, 0."""
    tokens: int = 0
    characters: int = 0
    lowest: Extreme | None = None
    """Smallest hash of all documents."""
    highest: Extreme | None = None
    """Largest hash of the held-out documents."""
    loss_tokens: int = 0
    """Of conversations: tokens that count in the loss."""
    sha256: str = ""
    """Of its .bin file."""
    mask_sha256: str = ""
    """Of its .mask file; empty: it has none."""
    bad: Rejected = Rejected()
    blank: Rejected = Rejected()
    unsafe_cuts: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    """Of the process, bytes."""
    files: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Of pre-tokenized data: records of .bin and .idx."""


@dataclass
class Done:
    """Work done, for the progress display."""

    bytes: int = 0
    """Of source files, about."""
    documents: int = 0
    tokens: int = 0


Report = Callable[[Done], None]


def path_of(folder: Path, job: Job, end: str) -> Path:
    """A file that a job writes: bin, mask, lengths.npy, counts.npy, held.npy or json."""
    return folder / JOBS / f"{job.name}.{end}"


def result_of(folder: Path, job: Job) -> JobResult | None:
    """The result of a job, or None if it is not complete."""
    try:
        return JobResult.model_validate_json(read_small(path_of(folder, job, "json")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return None  # written by another version, or damaged: the job is done again


class Tokenizing:
    """Runs jobs of a folder that is being built; opens the tokenizer once.

    Raises:
        UserError: the tokenizer or its encoder cannot be used here.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan
        try:
            self._tokenizer, self._encode = open_encoder(folder / plan.tokenizer.file, plan.encoder)
        except UnusableError as error:
            raise UserError(
                f"{plan.encoder}, with which this dataset is built, does not work here: {error}"
            ) from error
        self._cuts = cuts_of(self._tokenizer, proven=plan.proven_cuts)

    def run(self, job: Job, report: Report) -> JobResult:
        """Run a job, and write its files.

        Args:
            job: the job.
            report: called every half second with what was done since the last call.

        Raises:
            UserError: a file cannot be read, changed, or has a damaged record that is not to be
                skipped.
            OSError: the folder cannot be written.
        """
        started = time.monotonic()
        if job.kind == "tokens":
            from keel_megatron.corpus.ready_tokens import count_tokens

            result = count_tokens(self._folder, self._plan, job, report)
        else:
            pieces = Pieces(self._cuts)
            writing = _Writing(self._folder, self._plan, job, self._tokenizer, self._encode, pieces)
            result = writing.run(report)
        result = result.model_copy(
            update={"seconds": time.monotonic() - started, "peak_memory": peak_memory()}
        )
        write_whole(path_of(self._folder, job, "json"), result.model_dump_json())
        return result


class _Writing:
    """One job while it runs."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        job: Job,
        tokenizer: Tokenizer | HuggingFaceTokenizer,
        encode: Encode,
        pieces: Pieces,
    ) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._job = job
        self._limit = plan.sources[job.source].limit if not job.validation else 0
        self._vocab_size = plan.tokenizer.vocab_size
        self._encode = encode
        self._pieces = pieces
        self._tally = Tally(plan.on_bad_record)
        self._characters = 0
        self._held: list[int] = []
        self._lowest: Extreme | None = None
        self._highest: Extreme | None = None

    def run(self, report: Report) -> JobResult:
        """Write all tokens, then the result."""
        is_chat = self._job.kind == "conversations"
        paths = [path_of(self._folder, self._job, end) for end in ("bin", "mask")][: 1 + is_chat]
        # Two processes may do the same job, on different machines: each writes files of its own.
        own = f"{os.uname().nodename}.{os.getpid()}"
        new_paths = [path.with_name(f"{path.name}.{own}") for path in paths]
        try:
            with TokenWriter(new_paths[0], self._vocab_size, *new_paths[1:]) as writer:
                write = self._write_conversations if is_chat else self._write
                write(writer, _Reporter(report))
            self._save("lengths", np.array(writer.lengths, dtype=np.int32))
            self._save("counts", writer.counts)
            self._save("held", np.array(self._held, dtype=np.int64))
            for new, path in zip(new_paths, paths, strict=True):
                new.replace(path)
        finally:
            with suppress(OSError):
                for new in new_paths:
                    new.unlink(missing_ok=True)
        return self._result(writer)

    def _save(self, name: str, values: NDArray[Any]) -> None:
        save_array(path_of(self._folder, self._job, f"{name}.npy"), values)

    def _write_conversations(self, writer: TokenWriter, reporter: _Reporter) -> None:
        """Write the tokens of conversations, and which of them count in the loss."""
        with open_chat(self._tokenizer, self._folder) as chat:
            for unit in read_units(self._folder, self._job):
                encode = partial(self._encoded, chat)
                for key, (tokens, counts) in readers.read_chat(unit, self._tally, encode):
                    position = key_hash(key)
                    writer.begin_document(counted=not self._is_held(position))
                    writer.add_conversation(tokens, counts)
                    self._record(position, len(writer.lengths) - 1, len(tokens))
                    reporter.add(0, 1, writer.tokens_added)
                reporter.add(unit.stop - unit.start, 0, writer.tokens_added)
        reporter.finish(self._job.bytes)

    def _encoded(
        self, chat: ChatTokenizer, messages: Messages
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The tokens of a conversation, and which of them count.

        Raises:
            ValueError: it cannot be encoded.
        """
        encoded = chat.encode(messages)
        self._characters += sum(len(message["content"]) for message in messages)
        return encoded

    def _write(self, writer: TokenWriter, reporter: _Reporter) -> None:
        end = np.array([self._tokenizer.eod], dtype=np.int64)
        for unit in read_units(self._folder, self._job):
            before = self._characters
            is_plain = unit.file.kind in ("text", "jsonl") and not unit.file.compression
            ratio = 1 if is_plain else _COMPRESSION
            for document in self._documents(unit):
                first, position = writer.tokens_added, key_hash(document.key)
                writer.begin_document(counted=not self._is_held(position))
                for piece in self._pieces.of(document.chunks):
                    self._characters += len(piece)
                    writer.add(self._encode(piece))
                    reporter.add(len(piece) // ratio, 0, writer.tokens_added)
                if self._job.ends:
                    writer.add(end)
                writer.end_document()
                self._record(position, len(writer.lengths) - 1, writer.tokens_added - first)
                reporter.add(0, 1, writer.tokens_added)
            if is_plain:
                reporter.add(unit.stop - unit.start - (self._characters - before), 0, None)
        reporter.finish(self._job.bytes)

    def _documents(self, unit: Unit) -> Iterator[Document]:
        if self._job.kind == "part":
            yield Document(unit.file.name, text_of(unit))
        else:
            yield from readers.read(unit, self._tally)

    def _is_held(self, position: int) -> bool:
        """Whether the document with this hash is held out, or not in the training set at all."""
        if self._job.kind == "part":
            return self._job.held_out or self._job.validation
        return self._job.validation or position < self._limit

    def _record(self, position: int, document: int, tokens: int) -> None:
        """Note the document's side of the split."""
        if self._job.kind == "part" or self._job.validation:
            return
        found = Extreme(hash=position, document=document, tokens=tokens)
        if self._lowest is None or position < self._lowest.hash:
            self._lowest = found
        if position >= self._limit:
            return
        self._held.append(document)
        if self._highest is None or position > self._highest.hash:
            self._highest = found

    def _result(self, writer: TokenWriter) -> JobResult:
        tally = self._tally
        return JobResult(
            documents=len(writer.lengths) if self._job.ends else 0,
            tokens=writer.tokens_added,
            loss_tokens=writer.loss_tokens,
            characters=self._characters,
            lowest=self._lowest,
            highest=self._highest,
            sha256=writer.sha256.hexdigest(),
            mask_sha256=writer.mask_sha256.hexdigest() if writer.loss_tokens else "",
            bad=_rejected(tally.bad, tally.bad_bytes, tally.first_bad),
            blank=_rejected(tally.blank, tally.blank_bytes, tally.first_blank),
            unsafe_cuts=self._pieces.unsafe,
        )


class _Reporter:
    """Reports progress at intervals."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._done = Done()
        self._bytes = 0
        self._tokens = 0
        self._said = time.monotonic()

    def add(self, size: int, documents: int, tokens: int | None) -> None:
        """Add bytes and documents; `tokens` is the total so far."""
        done = self._done
        done.bytes += size
        done.documents += documents
        if tokens is not None:
            done.tokens += tokens - self._tokens
            self._tokens = tokens
        if time.monotonic() - self._said > _SECONDS_BETWEEN_REPORTS:
            self._send()

    def finish(self, size: int) -> None:
        """Report the rest: of the job's bytes, all."""
        self._done.bytes += size - self._bytes - self._done.bytes
        self._send()

    def _send(self) -> None:
        self._said = time.monotonic()
        self._bytes += self._done.bytes
        self._report(self._done)
        self._done = Done()


def text_of(unit: Unit) -> Iterator[str]:
    """The text of exactly the bytes [start, stop) of a plain text file, without a byte order mark.

    Raises:
        UserError: it is not UTF-8, or the file changed.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_first = unit.start == 0
    passed = unit.start
    try:
        for block in blocks(unit.file, unit.start, unit.stop):
            if b"\0" in block:
                raise UserError(f"{unit.file.location} is not text: it contains a NUL byte")
            text = decoder.decode(block)
            passed += len(block)
            yield text.removeprefix("\ufeff") if is_first else text
            is_first = False
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{unit.file.location} is not UTF-8 text (near byte {passed + error.start:,}); convert "
            "it to UTF-8"
        ) from None
    if passed != unit.stop:
        raise UserError(
            f"{unit.file.location} changed while it was read; restart when it is complete"
        )


def save_array(path: Path, values: NDArray[Any]) -> None:
    """Write an array to a .npy file atomically."""
    content = io.BytesIO()
    np.lib.format.write_array(content, values)
    write_whole(path, content.getvalue())


def peak_memory() -> int:
    """Largest memory of this process so far, bytes."""
    # Not getrusage: what it says begins with the process that started this one.
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _rejected(count: int, size: int, first: readers.BadRecord | None) -> Rejected:
    if first is None:
        return Rejected()
    return Rejected(count=count, bytes=size, first=f"{first.where()}: {first.reason}")
