"""Where a chat template comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keel_megatron.data.chat.rendering import Template
from keel_megatron.data.chat.templates import DEFAULT, FILE, find_template, template_beside
from keel_megatron.errors import UserError
from tests.data.chat.samples import ANSWER

BOS = "\n  {{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"


def test_the_order_in_which_they_are_looked_for(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    assert find_template(None, None).text == DEFAULT
    assert find_template(None, tokenizer).text == DEFAULT
    assert template_beside(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    found = find_template(None, tokenizer)
    assert (found.text, found.origin) == ("one", str(config))
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert find_template(None, tmp_path).text == "two"
    (tmp_path / FILE).write_text("three")
    assert find_template(None, tokenizer).text == "three"
    (tmp_path / "other.jinja").write_text("four")
    assert find_template(tmp_path / "other.jinja", tokenizer).text == "four"


def test_special_tokens_that_only_the_folder_knows_are_kept(tmp_path: Path) -> None:
    config = {"bos_token": {"content": '<"s\\>'}, "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": BOS}))
    found = template_beside(tmp_path)
    assert found is not None
    assert found.text == '{% set bos_token = "<\\"s\\\\>" %}\n' + BOS
    names = {"bos_token": '<"s\\>', "eos_token": "</s>"}
    given, kept = Template(BOS, names), Template(found.text, {"eos_token": "</s>"})
    assert given._render([ANSWER], prompt=False, mark="") == kept._render(
        [ANSWER], prompt=False, mark=""
    )


@pytest.mark.security
def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / FILE
    for content, why in ((b"\xff", "is not UTF-8"), (b" " * (1 << 20) + b"a", "cannot be read")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"data.chat_template: {path} {why}"):
            find_template(path, None)
