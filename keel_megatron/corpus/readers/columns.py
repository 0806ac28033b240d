"""The text column of Parquet files and of Arrow files as Hugging Face datasets writes them.

These files are untrusted: each batch is validated before it is read, and whatever is wrong with a
file is a damaged record.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from keel_megatron.corpus.documents import Document, SourceFile, Unit
from keel_megatron.corpus.packages import optional
from keel_megatron.corpus.readers.records import checked_text
from keel_megatron.corpus.readers.rejected import BadRecord
from keel_megatron.corpus.readers.streams import CHUNK, opened

OnBad = Callable[[BadRecord], None]
_BATCH_BYTES = 8 * CHUNK
_MOST_ROWS = 4096
_SHOWN = 200


class _ColumnError(Exception):
    """A file without a column of text; the message says why."""


def parts(file: SourceFile) -> int:
    """Number of row groups or record batches of a file; a damaged one counts and is the last.

    Raises:
        UserError: it cannot be read, or the package pyarrow is missing.
    """
    opened(file).close()
    number = 0
    try:
        if file.kind == "parquet":
            with _parquet(file) as table:
                number = int(table.num_row_groups)
        else:
            for _ in _batches(file, file.text_key):
                number += 1
    except _ColumnError:
        number += 1
    except _errors():
        number += 1
    return max(number, 1)


def read_columns(unit: Unit, on_bad: OnBad) -> Iterator[Document]:
    """The rows of a unit's row groups or record batches."""
    file = unit.file
    opened(file).close()
    try:
        if file.kind == "parquet":
            yield from _row_groups(unit, on_bad)
        else:
            yield from _record_batches(unit, on_bad)
    except _ColumnError as error:
        on_bad(BadRecord(file, "file", 0, str(error), file.size))
    except _errors() as error:
        on_bad(BadRecord(file, "file", 0, f"is damaged ({_short(error)})", file.size))


def _errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises for a damaged file."""
    pyarrow = optional("pyarrow", "Reading a Parquet or Arrow file")
    return (pyarrow.ArrowException, OSError, ValueError, OverflowError)


def _short(error: Exception) -> str:
    """The first line of a message."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:_SHOWN]


def _parquet(file: SourceFile) -> Any:
    parquet = optional("pyarrow.parquet", "Reading a Parquet file")
    return parquet.ParquetFile(
        file.location, buffer_size=CHUNK, pre_buffer=False, page_checksum_verification=True
    )


def _row_groups(unit: Unit, on_bad: OnBad) -> Iterator[Document]:
    """The rows of a unit of a Parquet file."""
    file = unit.file
    with _parquet(file) as table:
        column = _column_of(table.schema_arrow, file.text_key)
        metadata = table.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
        for group in range(unit.start, min(unit.stop, len(sizes))):
            row = sum(sizes[:group])
            rows = _rows_at_once(metadata.row_group(group), sizes[group])
            try:
                for batch in table.iter_batches(
                    rows, row_groups=[group], columns=[column], use_threads=False
                ):
                    yield from _documents(file, batch, row, on_bad)
                    row += batch.num_rows
            except _errors() as error:
                reason = f"the row group is damaged from here on ({_short(error)})"
                on_bad(BadRecord(file, "row", row, reason))


def _rows_at_once(group: Any, rows: int) -> int:
    """Rows of a batch, from a row group's own size."""
    size = max(group.total_byte_size, 1)
    return int(min(max(_BATCH_BYTES * rows // size, 1), _MOST_ROWS))


def _batches(file: SourceFile, key: str) -> Iterator[Any]:
    """The record batches of an Arrow file or stream, with the column `key` only."""
    pyarrow = optional("pyarrow", "Reading an Arrow file")
    ipc = optional("pyarrow.ipc", "Reading an Arrow file")
    with pyarrow.memory_map(file.location) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        open_it = ipc.open_file if is_file else ipc.open_stream
        options = ipc.IpcReadOptions(use_threads=False)
        with open_it(source) as reader:
            _column_of(reader.schema, key)
            options.included_fields = [reader.schema.get_field_index(key)]
        source.seek(0)
        with open_it(source, options=options) as reader:
            if is_file:
                yield from (reader.get_batch(n) for n in range(reader.num_record_batches))
            else:
                yield from reader


def _record_batches(unit: Unit, on_bad: OnBad) -> Iterator[Document]:
    """The rows of a unit of an Arrow file."""
    file, row = unit.file, 0
    batches = itertools.islice(_batches(file, file.text_key), unit.stop)
    number = -1
    try:
        for number, batch in enumerate(batches):
            if number >= unit.start:
                yield from _documents(file, batch, row, on_bad)
            row += batch.num_rows
    except _errors() as error:
        reason = f"the file is damaged from here on ({_short(error)})"
        on_bad(BadRecord(file, "row", row, reason))


def _column_of(schema: Any, key: str) -> str:
    """The column of this name, checked.

    Raises:
        _ColumnError: there is none, or it is not text.
    """
    if schema.names.count(key) != 1:
        names = ", ".join(repr(name) for name in schema.names[:8]) or "none"
        raise _ColumnError(f"has no column {key!r} (its columns: {names}); text_key names it")
    found = schema.field(key).type
    inner = getattr(found, "value_type", found) if str(found).startswith("dictionary") else found
    if str(inner) not in ("string", "large_string", "string_view", "null"):
        raise _ColumnError(f"its column {key!r} is {found}, not text")
    return key


def _values(column: Any) -> list[Any]:
    """The values of a column; those that are not UTF-8 as bytes.

    Raises:
        ArrowException: the column is invalid.
    """
    pyarrow = optional("pyarrow", "Reading a Parquet or Arrow file")
    try:
        column.validate(full=True)
        return list(column.to_pylist())
    except pyarrow.ArrowInvalid:
        raw = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
        if column.type not in raw:
            raise
        column = column.view(raw[column.type])
        column.validate(full=True)
    values = []
    for value in column.to_pylist():
        try:
            values.append(value if value is None else value.decode())
        except UnicodeDecodeError:
            values.append(value)
    return values


def _documents(file: SourceFile, batch: Any, row: int, on_bad: OnBad) -> Iterator[Document]:
    """The rows of a batch; its first is number `row` of the file."""
    column = batch.column(file.text_key)
    for number, value in enumerate(_values(column), row):
        try:
            text = checked_text(value, file.text_key)
        except ValueError as error:
            on_bad(BadRecord(file, "row", number, str(error)))
            continue
        if text.strip():
            yield Document(f"{file.name}@{number}", (text,))
        else:
            on_bad(BadRecord(file, "row", number, "is blank", len(text), blank=True))
