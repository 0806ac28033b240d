"""Table, picture and results.json of made-up results."""

from __future__ import annotations

import json
from pathlib import Path

from keel_megatron.studies.redundancy.outcome import different_texts
from keel_megatron.studies.redundancy.report import write_report
from tests.studies.redundancy.made_up import made_up


def test_the_report_has_every_run(tmp_path: Path) -> None:
    found = [made_up(), made_up(residual="pre_ln", digest="e" * 64), made_up(run="second")]
    text = write_report(found, tmp_path)
    assert [row.split(" | ")[1] for row in text.splitlines()[2:5]] == ["keel", "pre_ln", "keel"]
    assert "38% | 62%" in text
    assert str(different_texts(found)) in text
    assert different_texts(found[::2]) is None
    assert text in (tmp_path / "table.md").read_text()
    assert (tmp_path / "picture.png").stat().st_size > 20_000
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["made-up", "made-up", "second"]
