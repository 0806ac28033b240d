"""What `keel evaluate --text` prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from keel_megatron.errors import UserError
from keel_megatron.evaluation.perplexity import DocumentScore, Total, total
from keel_megatron.evaluation.text import Texts, evaluate_texts, stride_of
from keel_megatron.inference.source import Source
from keel_megatron.runtime.distributed import Runtime
from keel_megatron.runtime.json_text import json_text
from keel_megatron.runtime.tables import table_lines

_COLUMNS = ("text", "documents", "bytes", "tokens", "perplexity", "±", "bits per byte", "±")


class Report:
    """The documents' scores, by path.

    Args:
        about: the model and how it is evaluated, for JSON.
        paths: in their order.
    """

    def __init__(self, about: dict[str, Any], paths: tuple[Path, ...]) -> None:
        self.about = about
        self._documents: dict[Path, list[DocumentScore]] = {path: [] for path in paths}

    def add(self, path: Path, document: DocumentScore) -> None:
        """Take a document's score."""
        self._documents[path].append(document)

    def table(self) -> list[str]:
        """A line a path, and one of all together if there are several."""
        by_path, everything = self._totals()
        rows = [_row(str(path), found) for path, found in by_path.items()]
        if len(rows) > 1:
            rows.append(_row("all", everything))
        return table_lines(_COLUMNS, rows, left=(0,))

    def json(self) -> str:
        """The same as a JSON object."""
        by_path, everything = self._totals()
        texts = [{"text": str(path), **asdict(found)} for path, found in by_path.items()]
        content = {**self.about, "texts": texts, "total": asdict(everything)}
        return json_text(content)

    def _totals(self) -> tuple[dict[Path, Total], Total]:
        """Of each path, and of all documents."""
        everything = [one for documents in self._documents.values() for one in documents]
        return {path: total(found) for path, found in self._documents.items()}, total(everything)


class DocumentLines:
    """A file with a line of JSON a document; it is whole or not there.

    Args:
        path: the file; None: nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._partial = None if path is None else path.with_name(f"{path.name}.partial")
        self._stream: TextIO | None = None
        self._error: OSError | None = None

    def open(self) -> None:
        """Create the file.

        Raises:
            UserError: it cannot be written.
        """
        if self._partial is not None:
            try:
                self._stream = self._partial.open("w", encoding="utf-8")
            except OSError as error:
                raise self._refused(error) from error

    def add(self, path: Path, document: DocumentScore) -> None:
        """Write a line; an error is kept until the end."""
        if self._stream is None or self._error is not None:
            return
        line = json.dumps({"text": str(path), **document.record()}, ensure_ascii=False)
        try:
            self._stream.write(line + "\n")
        except OSError as error:
            self._error = error

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            UserError: it could not be written.
        """
        if self._stream is None or self._path is None or self._partial is None:
            return
        try:
            if self._error is not None:
                raise self._error
            self._stream.close()
            self._partial.replace(self._path)
        except OSError as error:
            raise self._refused(error) from error
        self._stream = None

    def discard(self) -> None:
        """Remove what is not whole."""
        if self._stream is not None and self._partial is not None:
            with suppress(OSError):
                self._stream.close()
            self._partial.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"--out: {self._path} cannot be written: {error.strerror}")


def report_texts(
    path: Path,
    source: Source,
    runtime: Runtime,
    texts: Texts,
    out: Path | None,
    say: Callable[[str], None],
) -> Report:
    """Score texts with a model; collective over all ranks.

    Args:
        path: the model's folder.
        source: the model.
        runtime: this rank's place.
        texts: what is scored.
        out: file that gets a line of JSON a document.
        say: called on rank 0 with messages.

    Returns:
        The scores, on rank 0.

    Raises:
        UserError: a text cannot be read, or the file not be written.
    """
    context = source.config.data.seq_length
    about = {
        "model": str(path),
        "step": source.step,
        "context": context,
        "stride": stride_of(texts.stride, context),
    }
    report, lines = Report(about, texts.paths), DocumentLines(out)

    def done(name: Path, document: DocumentScore) -> None:
        report.add(name, document)
        lines.add(name, document)

    runtime.from_main(lines.open)
    try:
        evaluate_texts(source, runtime, texts, say, done)
        runtime.from_main(lines.finish)
    finally:
        lines.discard()
    return report


def _row(name: str, found: Total) -> tuple[str, ...]:
    """The cells of a table."""
    return (
        name,
        f"{found.documents:,}",
        f"{found.bytes:,}",
        f"{found.tokens:,}",
        _number(found.perplexity, ".4g"),
        _number(found.perplexity_stderr, ".2g"),
        _number(found.bits_per_byte, ".4f"),
        _number(found.bits_per_byte_stderr, ".4f"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
