"""The studies' pages show the published numbers."""

from __future__ import annotations

import re

from tools import study_pages


def test_tables_are_made_from_the_published_numbers() -> None:
    pages = [path.read_text(encoding="utf-8") for path in study_pages.PAGES.glob("*.md")]
    for page in pages:
        assert study_pages.with_tables(page) == page
    shown = {name for page in pages for name in re.findall(r"<!-- results: (\S+) -->", page)}
    assert shown == {path.stem for path in study_pages.NUMBERS.glob("*.json")}
    assert all((study_pages.NUMBERS / f"{name}.png").is_file() for name in shown)
