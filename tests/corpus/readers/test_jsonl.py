"""JSON lines, in byte ranges."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel_megatron.corpus.documents import Unit
from keel_megatron.corpus.readers import Tally, jsonl, read, records
from keel_megatron.errors import UserError
from tests.corpus.files import COMPRESS, file_at, json_lines, skipping, texts

LINE = st.one_of(
    st.text(max_size=40).map(lambda text: json.dumps({"text": text + "."}).encode()),
    st.text(max_size=40).map(
        lambda text: json.dumps({"n": 1, "text": text + "."}, ensure_ascii=False).encode()
    ),
    st.sampled_from([b"", b"  ", b"\t", b'{"text": " "}', b"{broken", b"\xff", b"[1]"]),
)
CONTENT = st.tuples(
    st.booleans(),
    st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    LINE,
).map(lambda c: b"\xef\xbb\xbf" * c[0] + b"".join(a + b for a, b in c[1]) + c[2])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=CONTENT, cuts=st.lists(st.integers(0, 400), max_size=6))
def test_any_ranges_give_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(content)
    file = file_at(path, kind="jsonl")
    borders = [0, *sorted(min(cut, file.size) for cut in cuts), file.size]

    def documents(units: list[Unit]) -> tuple[list[tuple[str, str]], list[tuple[str, str]], int]:
        tally = Tally("skip")
        bad: list[tuple[str, str]] = []

        def on_bad(record: Any) -> None:
            tally(record)
            bad.append((record.where(), record.reason))

        found = [(d.key, "".join(d.chunks)) for unit in units for d in read(unit, on_bad)]
        return found, bad, tally.bad

    whole = documents([Unit(file, 0, file.size)])
    parts = [Unit(file, *pair) for pair in itertools.pairwise(borders)]
    assert documents(parts) == whole
    lines = content.removeprefix(b"\xef\xbb\xbf").decode(errors="replace").split("\n")
    assert len(whole[0]) == sum(line.lstrip().startswith("{") and '."}' in line for line in lines)


def test_lines_longer_than_blocks_and_ranges(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    expected = [f"{number}" * length for number, length in enumerate((10, 3 << 20, 5, 1 << 20, 7))]
    path.write_bytes(json_lines(*({"text": text} for text in expected))[:-1])
    file = file_at(path, kind="jsonl")
    assert list(texts(file, 1 << 30).values()) == expected
    assert texts(file, 100_000) == texts(file, 1 << 30)


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "is not valid JSON (Expecting property name"),
        (b'{"text": "a"} x', "is not valid JSON (Extra data"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'"text"', "is not a JSON object"),
        (b'{"id": 1, "body": "x"}', "has no key 'text' (its keys: 'id', 'body'); text_key names"),
        (b'{"text": null}', "'text' is null, not text"),
        (b'{"text": 3.5}', "'text' is a number, not text"),
        (b'{"text": ["a"]}', "'text' is a list, not text"),
        (b'{"text": "\xe9"}', "is not UTF-8 (byte 10 of the line)"),
        (b'{"text": "\\ud800"}', "'text' has half a surrogate pair (U+D800)"),
        (b"\0\0\0", "is not valid JSON"),
    ],
)
def test_a_damaged_record_is_named_by_file_and_line(
    tmp_path: Path, compression: str, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(COMPRESS[compression](good + b"\n" + line + b"\n" + good))
    file = file_at(path, kind="jsonl", compression=compression)
    with pytest.raises(UserError) as caught:
        texts(file)
    assert str(caught.value).startswith(f"{path}, line 3: {reason}")
    assert "data.on_bad_record to skip" in str(caught.value)
    found, tally = skipping(file)
    assert (found, tally.bad, tally.bad_bytes) == (["good", "good"], 1, len(line))
    assert tally.first_bad is not None
    assert tally.first_bad.where() == f"{path}, line 3"


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["truncated", "damaged"])
def test_a_damaged_stream_gives_what_is_before(
    tmp_path: Path, compression: str, damage: str
) -> None:
    path = tmp_path / "a"
    rows = [{"text": f"{number} {number * 7919 % 10007}"} for number in range(50_000)]
    content = COMPRESS[compression](json_lines(*rows))
    half = len(content) // 2
    path.write_bytes(content[:half] + (b"" if damage == "truncated" else b"\xff" * half))
    file = file_at(path, kind="jsonl", compression=compression)
    tally, reasons = Tally("skip"), list[str]()

    def on_bad(record: Any) -> None:
        tally(record)
        reasons.append(record.reason)

    assert 5_000 < len(list(read(Unit(file, 0, file.size), on_bad))) < 45_000
    # Damaged gzip data may be decompressed to something else, which ends or has a wrong check sum.
    assert f"the {compression} file is " in reasons[-1]
    assert damage == "damaged" or reasons[-1].endswith("truncated")
    with pytest.raises(UserError, match=rf"^{path}, line [\d,]+: "):
        texts(file)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_files_of_several_members(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"".join(COMPRESS[compression](json_lines({"text": t})) for t in "abc"))
    file = file_at(path, kind="jsonl", compression=compression)
    assert list(texts(file).values()) == ["a", "b", "c"]


def test_a_record_that_is_too_long_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines({"text": "x" * 3_000_000}, {"text": "short"}))
    file = file_at(path, kind="jsonl")
    monkeypatch.setattr(jsonl, "LARGEST_RECORD", 1_000_000)
    found, tally = skipping(file)
    assert (found, tally.bad) == (["short"], 1)
    assert tally.first_bad is not None
    assert tally.first_bad.reason == records.TOO_LONG == "is a record of more than 256 MiB"


def test_blank_records_are_counted_and_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines({"text": " \n"}, {"text": "x"}, {"text": ""}))
    tally = Tally("stop")
    assert list(texts(file_at(path, kind="jsonl"), tally=tally).values()) == ["x"]
    assert (tally.bad, tally.blank) == (0, 2)
    assert tally.first_blank is not None
    assert tally.first_blank.where() == f"{path}, line 1"


def test_another_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines({"body": "x", "text": 1}))
    assert texts(file_at(path, kind="jsonl", text_key="body")) == {"a.jsonl@0": "x"}
