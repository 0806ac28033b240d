"""Parquet files and Arrow files, which may be damaged or crafted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from keel_megatron.corpus.documents import SourceFile
from keel_megatron.corpus.readers import units
from keel_megatron.errors import UserError
from tests.corpus.files import arrow, file_at, parquet, skipping, table, texts

ROWS = [f"row {number} é" for number in range(1000)]
KINDS = {
    "parquet": lambda content: parquet(content, 100),
    "stream": lambda content: arrow(content, 100),
    "file": lambda content: arrow(content, 100, is_file=True),
}


def written(folder: Path, kind: str, content: pyarrow.Table, **fields: Any) -> SourceFile:
    path = folder / f"a.{kind}"
    path.write_bytes(KINDS[kind](content))
    return file_at(path, kind="parquet" if kind == "parquet" else "huggingface", **fields)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "column",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_any_ranges_give_the_same_rows(tmp_path: Path, kind: str, column: Any) -> None:
    content = pyarrow.table({"id": range(1000), "text": pyarrow.array(ROWS).cast(column)})
    file = written(tmp_path, kind, content)
    whole = texts(file, 1 << 30)
    assert list(whole.values()) == ROWS
    assert list(whole) == [f"a.{kind}@{number}" for number in range(1000)]
    assert len(units(file, 1 << 30)) == 1
    for size in (file.size // 3, 1):
        assert len(units(file, size)) == (10 if size == 1 else 4)
        assert list(texts(file, size).items()) == list(whole.items())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_text(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, kind, table(["a", " ", None, "b"]))
    with pytest.raises(UserError, match=rf"a.{kind}, row 2: 'text' is null, not text. Repair it"):
        texts(file)
    found, tally = skipping(file)
    assert (found, tally.bad, tally.blank) == (["a", "b"], 1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_the_column(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, kind, table(["a"]), text_key="body")
    with pytest.raises(UserError, match=r"has no column 'body' \(its columns: 'id', 'text'\); tex"):
        texts(file)
    file = written(tmp_path, kind, table(["a"]), text_key="id")
    with pytest.raises(UserError, match=r"its column 'id' is int64, not text"):
        texts(file)


@pytest.mark.security
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_not_utf8(tmp_path: Path, kind: str) -> None:
    raw = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    file = written(tmp_path, kind, pyarrow.table({"text": raw}))
    found, tally = skipping(file)
    assert (found, tally.bad) == (["good", "fine"], 1)
    assert tally.first_bad is not None
    assert (tally.first_bad.number, tally.first_bad.reason[:24]) == (1, "'text' is invalid UTF-8,")


@pytest.mark.security
def test_offsets_that_lead_out_of_the_file(tmp_path: Path) -> None:
    offsets = pyarrow.py_buffer(np.array([0, 4, 1 << 30], dtype=np.int32).tobytes())
    content = bytearray(arrow(pyarrow.table({"text": ["good", "fine"]})))
    at = content.index(np.array([0, 4, 8], dtype=np.int32).tobytes())
    content[at : at + 12] = offsets.to_pybytes()
    path = tmp_path / "a.arrow"
    path.write_bytes(bytes(content))
    found, tally = skipping(file_at(path, kind="huggingface"))
    assert (found, tally.bad) == ([], 1)
    assert tally.first_bad is not None
    assert tally.first_bad.reason.startswith("the file is damaged from here on")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_part_keeps_what_is_before(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, kind, table(ROWS))
    content = bytearray(file.path.read_bytes())
    middle = len(content) // 2
    content[middle - 2000 : middle] = b"\xff" * 2000
    file.path.write_bytes(bytes(content))
    found, tally = skipping(file, 5000)
    assert 100 < len(found) < 1000
    assert tally.bad >= 1
    assert found == [row for row in ROWS if row in set(found)]
    with pytest.raises(UserError, match=rf"a.{kind}, row \d+: "):
        texts(file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, kind, table(ROWS))
    whole = file.path.read_bytes()
    for size in (len(whole) // 2, 100, 10):
        file.path.write_bytes(whole[:size])
        short = file_at(file.path, kind=file.kind)
        found, tally = skipping(short, 5000)
        assert len(found) < 1000
        assert tally.bad == 1
        with pytest.raises(UserError, match=r"damaged.* Repair it, or set data.on_bad_record"):
            texts(short)


@pytest.mark.security
@pytest.mark.parametrize("kind", KINDS)
def test_any_changed_bytes_are_a_damaged_record_at_most(tmp_path: Path, kind: str) -> None:
    file = written(tmp_path, kind, table(ROWS[:300]))
    whole = file.path.read_bytes()
    chance = random.Random(kind)
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        file.path.write_bytes(bytes(content))
        skipping(file, chance.choice([1000, 1 << 30]))
