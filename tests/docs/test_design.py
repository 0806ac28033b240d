"""docs/design.md speaks of what there is: packages, files, rules."""

from __future__ import annotations

import ast
import re

from keel_megatron.architecture.residual import RULES
from tests.docs.commands import ROOT

TEXT = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "keel_megatron"


def test_its_packages_are_those_of_the_code() -> None:
    house = TEXT.partition("    keel_megatron/\n")[2].partition("\n    launchers/")[0]
    named = re.findall(r"^      (\w+)/", house, re.MULTILINE)
    assert sorted(named) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_its_files_exist() -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.\w+)`", TEXT)
    assert len(named) > 20
    absent = [name for name in named if not any((at / name).is_file() for at in (ROOT, PACKAGE))]
    assert absent == []


def test_its_rules_are_those_of_the_table() -> None:
    (listed,) = re.findall(r"holds each residual rule(.*?)A rule is one row", TEXT, re.DOTALL)
    named = re.findall(r"`([a-z_]+)`", listed)
    assert set(named) == set(RULES)


def test_its_limits_on_files_and_functions_are_kept() -> None:
    """Files below 400 lines, functions below 60."""
    long = []
    for folder in ("keel_megatron", "tests", "tools", "launchers", "docker"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if text.count("\n") >= 400:
                long.append(f"{path}: {text.count(chr(10))} lines")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    if lines >= 60:
                        long.append(f"{path}: {node.name} has {lines} lines")
    assert long == []
