"""Tables as plain lines."""

from __future__ import annotations

import pytest

from keel_megatron.runtime.tables import fitted, table_lines


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


def test_a_wide_table_is_shown_in_parts_that_fit_a_terminal() -> None:
    """Every cell stays, and each part has the first column."""
    columns = ["stage", *(f"column {n}" for n in range(9))]
    rows = [[str(row), *(f"{10**n + row:,}" for n in range(9))] for row in range(3)]
    text = "\n".join(["Title of the table", "", *table_lines(columns, rows)])
    shown = fitted(text, 50)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 50
    assert [line.split()[0] for line in lines if line.startswith("    ")] == ["0", "1", "2"] * 3
    for cell in (*columns, *(cell for row in rows for cell in row)):
        assert cell in shown
    assert fitted(text, 200) == text


def test_sentences_and_values_are_wrapped_at_words() -> None:
    text = "A sentence that is long.\n\nname     value\nsetting  one, two, three and-four"
    assert fitted(text, 18).splitlines() == [
        "A sentence that is",
        "long.",
        "",
        "name     value",
        "setting  one, two,",
        "         three",
        "         and-four",
    ]
    assert fitted("/a/path/that/is/longer", 10) == "/a/path/that/is/longer"
