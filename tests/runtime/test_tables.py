"""Tables as plain lines."""

from __future__ import annotations

import pytest

from keel_megatron.runtime.tables import table_lines


def test_columns_are_aligned_and_cells_are_shown_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No colours, no markup, no padding at the ends of lines, whatever the environment says."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    lines = table_lines(
        ["name", "cut", ""], [["a", "[2,2]", "1"], ["[bold]long", "-", ""]], left=[0]
    )
    assert lines == [
        "name          cut",
        "a           [2,2]  1",
        "[bold]long      -",
    ]


def test_a_wide_table_is_neither_cut_off_nor_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cells = ["x" * 300, *(str(n) * 40 for n in range(9))]
    lines = table_lines([str(n) for n in range(10)], [cells])
    assert len(lines) == 2
    assert lines[1].split() == cells


def test_a_table_without_rows_has_its_heading() -> None:
    assert table_lines(["a", "b"], []) == ["a  b"]
