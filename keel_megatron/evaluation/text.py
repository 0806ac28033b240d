"""Perplexity and bits per byte of any text: `keel evaluate --text`.

A document is scored as the model was trained on it: after an end-of-document token, which is not
scored. So all its tokens are, the first one too: every byte of the text is paid for, and models
with different tokenizers can be compared by bits per byte. The end-of-document token behind it is
not scored, because it is no part of the text.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Final

from keel_megatron.config.data import SourceConfig
from keel_megatron.corpus import readers
from keel_megatron.corpus.cuts import Pieces, cuts_of
from keel_megatron.corpus.documents import Document, SourceFile
from keel_megatron.corpus.documents import Source as TextSource
from keel_megatron.corpus.find import find_source
from keel_megatron.data.huggingface import HuggingFaceTokenizer
from keel_megatron.data.tokenizer import Tokenizer
from keel_megatron.errors import UserError
from keel_megatron.evaluation.perplexity import DocumentScore
from keel_megatron.evaluation.rows import Row
from keel_megatron.evaluation.scoring import SECONDS_BETWEEN_LINES, Scorer
from keel_megatron.inference.source import Source
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.tables import count

OPTION: Final = "--text"
_PORTION_BATCHES: Final = 8
"""Batches of each replica that are scored at a time, the longest rows first."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Texts:
    """What is evaluated, and how.

    Args:
        paths: files, folders or globs, of the formats that `keel data build` reads. A file that two
            of them reach belongs to the first.
        text_key: key or column of the text in a record.
        stride: see `windows`; None: half of the context.
        batch_tokens: tokens of a batch.
    """

    paths: tuple[Path, ...]
    text_key: str
    stride: int | None
    batch_tokens: int


def stride_of(stride: int | None, context: int) -> int:
    """The stride in tokens.

    Raises:
        UserError: it is not from 1 to the context.
    """
    found = max(1, context // 2) if stride is None else stride
    if not 1 <= found <= context:
        raise UserError(
            f"--stride: {found} must be from 1 to the context, {context} (data.seq_length)"
        )
    return found


def evaluate_texts(
    source: Source,
    runtime: Runtime,
    texts: Texts,
    say: Say,
    done: Callable[[Path, DocumentScore], None],
) -> None:
    """Score the documents of texts; collective over all ranks.

    Args:
        source: the model.
        runtime: this rank's place. Rank 0 alone reads the texts.
        texts: what is scored.
        say: called on rank 0 with messages: what is skipped or lost, and progress.
        done: called on rank 0 with each document in order, and the path that it is of.

    Raises:
        UserError: a text cannot be read, there is none, or the logits are not finite.
    """
    scorer = Scorer(source, runtime, texts.batch_tokens)
    stride = stride_of(texts.stride, scorer.context)
    reading = _Reading(source.tokenizer, texts, scorer.context, stride, say)
    portion = _PORTION_BATCHES * texts.batch_tokens * runtime.data_size
    rows: Iterator[Row] = iter(())

    def start() -> None:
        nonlocal rows
        rows = reading.rows(reading.sources())

    runtime.from_main(start)
    while batch := runtime.from_main(lambda: _portion(rows, portion)):
        scores = scorer.score(batch)
        if runtime.is_main:
            for name, document in reading.add([-score.total for score in scores]):
                done(name, document)
    if runtime.is_main:
        for name, document in reading.finish():
            done(name, document)


def _portion(rows: Iterator[Row], tokens: int) -> list[Row]:
    """The next rows of about so many tokens."""
    found, left = [], tokens
    while left > 0 and (more := list(islice(rows, 1))):
        found += more
        left -= len(more[0].tokens)
    return found


def windows(pieces: Iterable[Sequence[int]], eod: int, context: int, stride: int) -> Iterator[Row]:
    """Rows in which each token of a document is scored once.

    The first row is the document's first `context` tokens, after `eod`. Each further one scores the
    next `stride` tokens (the last one what is left) in a full context: with at least
    context - stride + 1 tokens before each. So a shorter stride gives more context and takes
    longer; with stride = context the rows do not overlap.

    Args:
        pieces: the document's tokens.
        eod: the end-of-document token.
        context: tokens that the model sees at most.
        stride: from 1 to context.
    """
    seen, new, size = [eod], 0, context
    for piece in pieces:
        seen += piece
        new += len(piece)
        while new >= size:
            end = len(seen) - new + size
            yield Row(tuple(seen[max(0, end - context - 1) : end]), size)
            new -= size
            size = stride
        del seen[: max(0, len(seen) - new - context)]
    if new:
        yield Row(tuple(seen[-(context + 1) :]), new)


@dataclass
class _Open:
    """A document of which rows have been read, but not all are scored."""

    path: Path
    score: DocumentScore
    rows: int = 0
    """That were read and are not scored yet."""


@dataclass
class _Reading:
    """Reads documents as rows, and puts the rows' scores together again. On rank 0."""

    tokenizer: Tokenizer | HuggingFaceTokenizer
    texts: Texts
    context: int
    stride: int
    say: Say
    open: deque[_Open] = field(default_factory=deque)
    documents: int = 0
    tokens: int = 0
    lossy: int = 0

    def __post_init__(self) -> None:
        self._began = self._said = time.monotonic()
        self._tally = readers.Tally("skip")
        self._pieces = Pieces(cuts_of(self.tokenizer))

    def sources(self) -> list[tuple[Path, TextSource]]:
        """The files of each path.

        Raises:
            UserError: one cannot be read, or has no text.
        """
        found, taken = [], set[str]()
        for path in self.texts.paths:
            wanted = SourceConfig(path=(path,), text_key=self.texts.text_key)
            source = find_source(OPTION, wanted, self.say)
            if source.kind == "megatron":
                raise UserError(
                    f"{OPTION}: {path} holds .bin and .idx pairs, which are tokens; give the text"
                )
            files = [f for f in source.files if os.path.realpath(f.location) not in taken]
            taken |= {os.path.realpath(file.location) for file in files}
            found.append((path, replace(source, files=tuple(files))))
        return found

    def rows(self, sources: list[tuple[Path, TextSource]]) -> Iterator[Row]:
        """The rows of all documents, in order."""
        for path, source in sources:
            for file in source.files:
                for document in self._documents(file):
                    yield from self._rows_of(path, document)

    def _documents(self, file: SourceFile) -> Iterator[Document]:
        for unit in readers.units(file, max(file.size, 1)):
            yield from readers.read(unit, self._tally)

    def _rows_of(self, path: Path, document: Document) -> Iterator[Row]:
        one = _Open(path, DocumentScore(document.key))
        self.open.append(one)
        tokens = self._tokens_of(document, one.score)
        for row in windows(tokens, self.tokenizer.eod, self.context, self.stride):
            one.rows += 1
            yield row

    def _tokens_of(self, document: Document, score: DocumentScore) -> Iterator[list[int]]:
        """The document's tokens, as `keel data build` makes them."""
        for piece in self._pieces.of(document.chunks):
            tokens = self.tokenizer.encode(piece)
            score.bytes += len(piece.encode())
            score.tokens += len(tokens)
            score.lost += self.tokenizer.lost(piece, tokens)
            yield tokens

    def add(self, nats: list[float]) -> Iterator[tuple[Path, DocumentScore]]:
        """Take the scores of the next rows; yields the documents that are complete."""
        for value in nats:
            # Rows are scored in the order in which they are read: a document without rows that
            # wait is complete, if there is a score of a later one.
            while not self.open[0].rows:
                yield self._close()
            self.open[0].score.nats += value
            self.open[0].rows -= 1
        self._say_progress()

    def finish(self) -> Iterator[tuple[Path, DocumentScore]]:
        """The documents that are left; then says what is skipped or lost.

        Raises:
            UserError: there was no document.
        """
        while self.open:
            yield self._close()
        tally = self._tally
        if tally.bad and tally.first_bad is not None:
            first = tally.first_bad
            self.say(
                f"{OPTION}: {count(tally.bad, 'damaged record')} left out; the first: "
                f"{first.where()}: {first.reason}"
            )
        if not self.documents:
            raise UserError(f"{OPTION}: there is no document in {self._where()}")
        if self.lossy:
            self.say(
                f"{OPTION}: the tokenizer loses characters of {self.lossy:,} of "
                f"{count(self.documents, 'document')}: their bits per byte are too low"
            )
        if self._pieces.unsafe:
            self.say(
                f"{OPTION}: {count(self._pieces.unsafe, 'long line')} cut where tokens may differ"
            )

    def _close(self) -> tuple[Path, DocumentScore]:
        one = self.open.popleft()
        self.documents += 1
        self.tokens += one.score.tokens
        self.lossy += one.score.lost > 0
        return one.path, one.score

    def _say_progress(self) -> None:
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        tokens = self.tokens + sum(one.score.tokens for one in self.open)
        self.say(
            f"so far: {count(self.documents, 'document')}, {tokens:,} tokens, "
            f"{tokens / (now - self._began):,.0f} tokens/s"
        )

    def _where(self) -> str:
        return ", ".join(map(str, self.texts.paths))
