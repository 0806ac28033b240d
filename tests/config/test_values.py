"""Values as YAML has them and as people mean them: overrides, numbers, switches, paths."""

from __future__ import annotations

from pathlib import Path

import pytest

import yaml
from keel_megatron.config import dump_config, load_config, parse_config
from keel_megatron.config.yaml_text import read_yaml
from keel_megatron.errors import ConfigError
from tests.config.test_load import complaints
from tests.settings import settings


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.text=", "is empty; write null for none, '\"\"' for empty text"),
        ("tracking.uri=  ", "is empty; write null for none"),
        ("tracking.sample_prompt=a # b", "parsed as 'a'; to keep it as text, write '\"a # b\"'"),
        ("tracking.sample_prompt=# b", "parsed as null; to keep it as text, write '\"# b\"'"),
        ("tracking.sample_prompt=The ", "parsed as 'The'; to keep it as text, write '\"The \"'"),
        ("tracking.sample_prompt=a\nb", r"parsed as 'a b'; to keep it as text, write "),
        ("tracking.sample_prompt=&a b", "parsed as 'b'; to keep"),
        ("tracking.sample_prompt=--- b", "parsed as 'b'; to keep"),
        ("tracking.sample_prompt=!!str 5", "parsed as '5'; to keep"),
        ('tracking.sample_prompt="a" # b', "parsed as 'a'; to keep"),
        ("training.steps=3 # few", "parsed as 3; to keep"),
        ("data.text=[a, b] # c", "parsed as [a, b]; to keep"),
    ],
)
def test_an_override_of_which_yaml_would_lose_a_part_is_refused(
    config_file: Path, override: str, expected: str
) -> None:
    (found,) = complaints(config_file, override)
    assert expected in found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"a # b"', "a # b"),
        ("'# a'", "# a"),
        ("a#b", "a#b"),
        ('" The "', " The "),
        ('""', ""),
        (r'"a\nb"', "a\nb"),
        ("null", None),
    ],
)
def test_an_override_in_quotes_is_taken_whole(
    config_file: Path, text: str, value: str | None
) -> None:
    config = load_config(config_file, [f"tracking.sample_prompt={text}"])
    assert config.tracking.sample_prompt == value


@pytest.mark.parametrize("name", ["2024-01-31", "0100", "0x1f", "no", "on", "2024-13-01"])
def test_what_yaml_1_1_alone_takes_for_no_text_is_text(config_file: Path, name: str) -> None:
    config = load_config(config_file, [f"training.name={name}"])
    assert config.training.name == name
    dumped = yaml.safe_load(dump_config(config))  # as any other program reads it
    assert dumped["training"]["name"] == name


def test_numbers_are_decimal(config_file: Path) -> None:
    config = load_config(config_file, ["training.steps=1_000", "optimizer.learning_rate=+.5e-2"])
    assert config.training.steps == 1000
    assert config.optimizer.learning_rate == 0.005


@pytest.mark.parametrize("in_file", [True, False])
def test_the_home_folder_in_a_path_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_file: bool
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    path, sections = tmp_path / "run.yaml", settings()
    values = {
        "data": {"text": ["~/a", "b/~"], "tokenizer": "~/t.model", "cache_dir": "~"},
        "training": {"runs_dir": "./~/runs"},
    }
    for section, entries in values.items() if in_file else ():
        sections[section] |= entries
    path.write_text(yaml.safe_dump(sections))
    overrides = ["data.text=[~/a, b/~]", "data.tokenizer=~/t.model", 'data.cache_dir="~"']
    overrides += ["training.runs_dir=./~/runs"]
    config = load_config(path, [] if in_file else overrides)
    assert config.data.text == (Path("/home/me/a"), Path("b/~"))
    assert config.data.tokenizer == Path("/home/me/t.model")
    assert config.data.cache_dir == Path("/home/me")
    assert config.training.runs_dir == tmp_path / "~/runs"  # a folder that is called so
    assert parse_config(read_yaml(dump_config(config)), "dump") == config


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{path: a, textkey: b}]", "data.sources.0.textkey: is unknown; did you mean text_key?"),
        ("[{path: a}, {path: b, weight: -3}]", "data.sources.1.weight: -3 must be greater than 0"),
        ("[{path: a, format: csv}]", "data.sources.0.format: 'csv' must be one of auto, text, "),
        ("[{path: a, text_key: ''}]", "data.sources.0.text_key: '' is empty"),
        ("[web]", "data.sources.0: 'web' is not a section of key: value lines"),
        ("web", "data.sources: 'web' is not a list of sources, each with a path, such as "),
        ("[{path: a, weight: 1}, {path: b}]", "data: give every entry of data.sources a weight"),
    ],
)
def test_an_error_in_a_source_names_the_entry_and_its_key(
    config_file: Path, sources: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, [f"data.sources={sources}"])
    assert [str(problem)[: len(message)] for problem in caught.value.problems] == [message]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rates={matrix: 2.0}", "rates.matrix: is unknown; did you mean matrices?"),
        ("rates={norms: -1}", "rates.norms: -1 must be at least 0"),
        ("rates=2.0", "rates: 2.0 is not a section of key: value lines"),
        ("depth_rates=0.5", "depth_rates: 0.5 is not a list of ranges of blocks, each with a "),
        ("depth_rates=[{blocks: [0, 1]}]", "depth_rates.0.factor: is missing: Factor of the le"),
        ("depth_rates=[{blocks: [0, 99], factor: 1}]", "depth_rates.0.blocks: [0, 99] must be "),
        ("depth_rates=[{blocks: [1, 0], factor: 1}]", "depth_rates.0.blocks: [1, 0] must be "),
        (
            "depth_rates=[{blocks: [0, 1], factor: 1}, {blocks: [1, 2], factor: 2}]",
            "depth_rates.1.blocks: [1, 2] overlaps with optimizer.depth_rates.0",
        ),
    ],
)
def test_an_error_in_a_factor_of_the_rate_names_it(
    config_file: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, [f"optimizer.{override}"])
    (problem,) = caught.value.problems
    assert str(problem).startswith(f"optimizer.{message}")


def test_a_shared_matrix_has_the_embeddings_rate(config_file: Path) -> None:
    overrides = ["model.tie_embeddings=true", "optimizer.rates={head: 0.5}"]
    with pytest.raises(ConfigError, match=r"optimizer\.rates\.head: 0\.5 has nothing to apply to"):
        load_config(config_file, overrides)
