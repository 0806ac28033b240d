"""Counting of damaged and blank records."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.corpus.readers.rejected import BadRecord, Tally
from keel_megatron.errors import UserError
from tests.corpus.files import file_at


def test_the_first_of_each_kind_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n22\n333\n")
    file = file_at(path, kind="jsonl")
    tally = Tally("skip")
    for offset in (2, 5):
        tally(BadRecord(file, "byte", offset, "is wrong", 3))
        tally(BadRecord(file, "byte", offset + 1, "is blank", 1, blank=True))
    assert (tally.bad, tally.bad_bytes, tally.blank, tally.blank_bytes) == (2, 6, 2, 2)
    assert tally.first_bad is not None
    assert tally.first_bad.where() == f"{path}, line 2"


@pytest.mark.parametrize(
    ("place", "number", "expected"),
    [("row", 12_345, ", row 12,345"), ("line", 3, ", line 3"), ("file", 0, "")],
)
def test_places(tmp_path: Path, place: str, number: int, expected: str) -> None:
    path = tmp_path / "a.parquet"
    path.touch()
    record = BadRecord(file_at(path, kind="parquet"), place, number, "is wrong")  # type: ignore[arg-type]
    assert record.where() == f"{path}{expected}"
    with pytest.raises(UserError, match=rf"^{path}{expected}: is wrong. Repair it, or set data.on"):
        Tally("stop")(record)
