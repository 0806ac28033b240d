"""docs/gpu.md names tests, files and checks that are there."""

from __future__ import annotations

import re

from tests.docs.commands import ROOT
from tests.gpu.test_checks import NAMES

TEXT = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_every_risk_names_tests_that_are_there() -> None:
    rows = TEXT.partition("## Known risks")[2].splitlines()
    risks = [row for row in rows if row.startswith("| ") and not row.startswith("| risk")]
    assert len(risks) > 25
    for row in risks:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)


def test_its_files_are_there() -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", TEXT)
    assert len(named) > 15
    there = [ROOT, ROOT / "keel_megatron"]
    assert [name for name in named if not any((at / name).is_file() for at in there)] == []


def test_its_checks_are_those_of_the_script() -> None:
    table = TEXT.partition("| check | passes if |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([\w ]+) \|", table, re.MULTILINE) == list(NAMES)
