"""Settings that were renamed: their old names still work, with a notice on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import yaml
from keel_megatron.cli.main import app
from keel_megatron.config import ConfigError, RunConfig, load_config, parse_config
from keel_megatron.config.renamed import RENAMED
from tests.settings import settings

OLD = {
    "checkpoint__asynchronous": False,
    "data__cache": "/prepared",
    "deepspeed__bucket_elements": 1000,
}


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(**OLD)))
    return path


def test_every_old_name_leads_to_a_setting_and_is_none_itself() -> None:
    assert {path.replace(".", "__") for path in RENAMED} == OLD.keys()
    for path, new in RENAMED.items():
        section, old = path.split(".")
        fields = RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        assert new in fields
        assert old not in fields


def test_a_saved_configuration_with_old_names_loads_silently(
    old_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config(old_file)
    assert config.checkpoint.async_save is False
    assert config.data.cache_dir == Path("/prepared")
    assert config.deepspeed.bucket_size == 1000
    assert capfd.readouterr() == ("", "")


def test_the_command_line_prints_one_notice_per_old_name(old_file: Path) -> None:
    result = CliRunner().invoke(
        app, ["config", "show", str(old_file), "data.cache=b", "checkpoint.asynchronous=true"]
    )
    assert result.exit_code == 0
    shown = yaml.safe_load(result.stdout)
    assert shown["data"]["cache_dir"] == "b"
    assert "cache" not in shown["data"]
    assert shown["checkpoint"]["async_save"] is True
    notices = result.stderr.splitlines()
    assert len(notices) == 3
    assert "notice: data.cache is now data.cache_dir" in notices


@pytest.mark.parametrize("variable", [("RANK", "1"), ("KEEL_LAUNCHER_PID", "1")])
def test_one_process_of_a_run_prints_the_notices(
    old_file: Path, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str]
) -> None:
    monkeypatch.setenv(*variable)
    result = CliRunner().invoke(app, ["config", "show", str(old_file)])
    assert result.exit_code == 0
    assert not result.stderr


def test_an_override_by_either_name_replaces_a_setting_by_either_name(old_file: Path) -> None:
    assert load_config(old_file, ["data.cache_dir=c"]).data.cache_dir == Path("c")
    assert load_config(old_file, ["data.cache=d"]).data.cache_dir == Path("d")


def test_both_names_of_a_setting_in_one_configuration_are_an_error() -> None:
    both = settings(data__cache="a", data__cache_dir="b")
    with pytest.raises(ConfigError, match=r"data\.cache: is the old name of data\.cache_dir"):
        parse_config(both, "test")
