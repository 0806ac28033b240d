"""Which documents are held out does not depend on how a build is divided."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.corpus import split
from keel_megatron.corpus.split import ALL, is_single_text, key_hash, limit_of, split_offset
from tests.corpus.files import found


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.02), (3, 0.49), (40, 0.02), (40, 0.2)])
def test_a_fraction_of_files_at_least_one(tmp_path: Path, count: int, fraction: float) -> None:
    names = [f"{number}.txt" for number in range(count)]
    for name in names:
        (tmp_path / name).write_text(name)
    limit = limit_of(found(tmp_path), fraction)
    held = {name for name in names if key_hash(name) < limit}
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert held == set(ordered[: min(count - 1, max(1, round(fraction * count)))])


def test_records_are_held_out_with_a_probability(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert limit_of(found(tmp_path), 0.25) == ALL // 4


def test_a_source_with_validation_files_holds_nothing_out(tmp_path: Path) -> None:
    for name in ("a", "b", "v"):
        (tmp_path / f"{name}.txt").write_text("text")
    source = found(tmp_path / "a.txt", tmp_path / "b.txt", validation=[str(tmp_path / "v.txt")])
    assert limit_of(source, 0.1) == 0


def reference(text: str, fraction: float) -> int:
    """Character at which a text is split, as for a text in memory."""
    at = int(len(text) * (1.0 - fraction))
    nearest = max(at - (len(text) - at), 0)
    return text.rfind("\n", nearest, at) + 1 or at


@settings(deadline=None, max_examples=200)
@given(
    st.text(alphabet="ab\n\u00e9\u4f60\U0001f600", min_size=1, max_size=60),
    st.sampled_from([0.02, 0.1, 0.3, 0.49]),
    st.sampled_from([1, 2, 5, 1 << 20]),
    st.booleans(),
)
def test_a_single_text_is_split_near_its_end(
    tmp_path_factory: pytest.TempPathFactory, text: str, fraction: float, block: int, bom: bool
) -> None:
    if not text.strip():
        return
    path = tmp_path_factory.mktemp("split") / "text.txt"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    source = found(path)
    assert is_single_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_BLOCK", block if not bom else 1 << 20)
        at = split_offset(source.files[0], fraction)
    head = path.read_bytes()[:at].decode().removeprefix("\ufeff")
    assert head == text[: reference(text, fraction)]
