"""docs/reference/ is written from the code, and up to date."""

from __future__ import annotations

import pytest

from keel_megatron.config import RunConfig
from keel_megatron.runtime import exit_codes
from tools import reference_pages
from tools.reference import commands, files, settings, source


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {path.stem: text for path, text in reference_pages.pages().items()}


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_a_page_is_up_to_date(name: str, pages: dict[str, str]) -> None:
    path = reference_pages.FOLDER / f"{name}.md"
    assert path.read_text("utf-8") == pages[name], "run python tools/reference_pages.py"


def test_every_setting_has_a_row_with_its_values_and_default(pages: dict[str, str]) -> None:
    text = pages["settings"]
    for section, field in RunConfig.model_fields.items():
        for key in field.annotation.model_fields:  # type: ignore[union-attr]
            assert f'<a id="{section}.{key}"></a>`{section}.{key}` |' in text
    for row in (
        "`model.blocks` | integer > 0 | required |",
        "`model.num_query_groups` | integer > 0 or `null` | `null` |",
        "`parallel.layout` | list of integers or `null` | `null` |",
        "`optimizer.beta2` | number ≥ 0, < 1 | `0.95` |",
        "`guard.action` | `off`, `warn`, `skip`, `rollback` | `warn` |",
    ):
        assert row in text
    assert [key for key, _model in settings.nested(RunConfig.model_fields["optimizer"].annotation)]


def test_every_command_and_option_is_described(pages: dict[str, str]) -> None:
    import typer

    from keel_megatron.cli.main import app

    sections = dict(
        part.partition("\n")[::2] for part in pages["commands"].split("\n## ") if "\n" in part
    )
    found = dict(commands.commands(typer.main.get_command(app)))
    assert {"keel train", "keel checkpoint verify", "keel study alpha"} <= found.keys()
    for words, command in found.items():
        for parameter in command.params:
            names = [name for name in parameter.opts if name.startswith("--")]
            assert all(name in sections[words] for name in names if name != "--help")


def test_the_exit_codes_are_those_of_the_module(pages: dict[str, str]) -> None:
    constants = {
        value
        for name, value in vars(exit_codes).items()
        if name.isupper() and isinstance(value, int)
    }
    rows = [line for line in pages["exit-codes"].splitlines() if line.startswith("| ")]
    named = {
        int(code) for row in rows for code in row.split("|")[1].split(",") if code.strip().isdigit()
    }
    assert constants | exit_codes.FINAL <= named


def test_files_of_a_run_are_known_by_their_names() -> None:
    for name in (
        "config.yaml",
        "checkpoints/step_00000003/rank_00001.safetensors",
        "checkpoints/step_00000003/tokenizer.model",
        "outbox/system-node-1.1732.jsonl",
        "hangs/20261126/rank_00000.txt",
    ):
        assert files.is_known(name), name
    assert not files.is_known("secrets.txt")


def test_sources_are_read_without_importing_them() -> None:
    assert source.constant("checkpoint.manifest", "MANIFEST") == "manifest.json"
    assert "_SECONDS" not in source.text("runtime.ownership")
    found = source.fields("tracking.records", "StepRecord")
    fields = {name: said for name, _kind, said in found}
    assert fields["loss"] == "Mean cross entropy of the global batch, nats per token."
