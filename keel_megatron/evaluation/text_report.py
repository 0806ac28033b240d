"""What `keel evaluate --text` prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

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

    def lines(self) -> str:
        """Each document's score, a JSON object a line."""
        records = (
            {"text": str(path), **one.record()}
            for path, documents in self._documents.items()
            for one in documents
        )
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def _totals(self) -> tuple[dict[Path, Total], Total]:
        """Of each path, and of all documents."""
        everything = [one for documents in self._documents.values() for one in documents]
        return {path: total(found) for path, found in self._documents.items()}, total(everything)


def report_texts(
    path: Path,
    source: Source,
    runtime: Runtime,
    texts: Texts,
    say: Callable[[str], None],
) -> Report:
    """Score texts with a model; collective over all ranks.

    Args:
        path: the model's folder.
        source: the model.
        runtime: this rank's place.
        texts: what is scored.
        say: called on rank 0 with messages.

    Returns:
        The scores, on rank 0.

    Raises:
        UserError: a text cannot be read.
    """
    context = source.config.data.seq_length
    about = {
        "model": str(path),
        "step": source.step,
        "context": context,
        "stride": stride_of(texts.stride, context),
    }
    report = Report(about, texts.paths)
    evaluate_texts(source, runtime, texts, say, report.add)
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
