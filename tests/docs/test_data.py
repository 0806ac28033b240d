"""docs/data.md: its settings are valid, its lists complete."""

from __future__ import annotations

import re
from typing import get_args

import yaml
from keel_megatron.config.data import DataConfig, Format
from keel_megatron.corpus.formats import JSON_LINES, MARKUP, PARQUET
from keel_megatron.corpus.readers.records import LARGEST_RECORD
from tests.docs.commands import ROOT

TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_its_settings_are_valid() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        settings = yaml.safe_load(block)["data"]
        DataConfig.model_validate({"seq_length": 8, "vocab_size": 320, **settings})


def test_its_formats_are_those_that_are_read() -> None:
    table = re.findall(r"^\| `(\w+)` \| [^|]*\| (?:a|as) ", TEXT, re.MULTILINE)
    assert ["auto", *table] == list(get_args(Format))
    for suffix in (*JSON_LINES, *PARQUET, *MARKUP):
        assert suffix == ".htm" or f"`{suffix}`" in TEXT
    assert f"more than {LARGEST_RECORD >> 20} MiB" in TEXT
