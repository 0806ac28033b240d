"""What pages say of the code: messages, settings, steps of an extension."""

from __future__ import annotations

import ast
import re

import pytest

from keel_megatron.architecture.residual import RULES, Model, Rule, SubLayer
from keel_megatron.config import RunConfig
from tests.docs.commands import ROOT
from tests.settings import small_config

DOCS = ROOT / "docs"
SETTINGS = {
    f"{section}.{key}"
    for section, field in RunConfig.model_fields.items()
    for key in field.annotation.model_fields  # type: ignore[union-attr]
}


def messages() -> set[str]:
    """All texts in the code, with {} for what is filled in."""
    found = set()
    for path in (ROOT / "keel_megatron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
                ]
                found.add("".join(map(str, parts)))
    return {" ".join(text.split()) for text in found}


def is_among(message: str, texts: set[str]) -> bool:
    """Whether a message, in which ... stands for anything, is part of a text."""
    parts = re.split(r"\s*\.\.\.\s*", message)
    assert sum(map(len, parts)) > 15, f"{message}: too short to be found"
    pattern = re.compile(".*".join(map(re.escape, parts)))
    near = (text for text in texts if all(part in text for part in parts))
    return any(pattern.search(text) for text in near)


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> `(.*)`$", page, re.MULTILINE)
    assert len(quoted) > 30
    texts = messages()
    assert [message for message in quoted if not is_among(message, texts)] == []
    assert not is_among("... is a message that nobody wrote", texts)


@pytest.mark.parametrize("page", ["troubleshooting.md", "coming-from.md", "extending/optimizer.md"])
def test_the_settings_that_a_page_names_exist(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    if page == "coming-from.md":  # the second column
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
        text = "\n".join(row[1] for row in rows)
        assert len(rows) > 90
    sections = "|".join(RunConfig.model_fields)
    named = set(re.findall(rf"`((?:{sections})\.[a-z0-9_]+)\b", text))
    assert named <= SETTINGS
    if page == "coming-from.md":
        assert set(re.findall(r"`([^`]+)`", text)) - {"none"} <= SETTINGS


def test_the_rule_that_is_added_as_an_example_is_valid() -> None:
    page = (DOCS / "extending" / "residual-rule.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    before = set(RULES)
    try:
        exec(code, {"RULES": RULES, "Rule": Rule, "SubLayer": SubLayer, "Model": Model})
        (name,) = set(RULES) - before
        model = small_config(model__residual=name, model__blocks=8).model
        assert RULES[name].sub_layer(3, model) == SubLayer(branch_factor=0.25, inner="norm")
    finally:
        for added in set(RULES) - before:
            del RULES[added]


def test_the_columns_of_a_rule_are_listed() -> None:
    page = (DOCS / "extending" / "residual-rule.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE)
    assert set(named) == set(SubLayer.__dataclass_fields__) | set(Rule.__dataclass_fields__) - {
        "sub_layer"
    }


def test_the_tests_that_the_page_of_exactness_names_exist() -> None:
    text = (DOCS / "exactness.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", text))
    assert len(named) > 30
    missing = [
        f"{path}::{test}"
        for path, test in sorted(named)
        if f"def {test}(" not in (ROOT / "tests" / path).read_text(encoding="utf-8")
    ]
    assert missing == []
