"""Wrong configurations: every problem at once, each with its setting and what would be right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import yaml
from keel_megatron.config import ConfigError, RunConfig, dump_config, load_config, parse_config
from keel_megatron.config.schema import json_schema
from keel_megatron.model.residual import sub_layer
from tests.settings import settings


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings()))
    return path


def complaints(path: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.blocks=many", "model.blocks: 'many' is not a whole number"),
        ('model.blocks="8"', "model.blocks: '8' is not a whole number (remove the quotes)"),
        ("model.blocks=8.5", "model.blocks: 8.5 is not a whole number"),
        ("training.seed=true", "training.seed: True is not a whole number"),
        ("model.blocks=0", "model.blocks: 0 must be greater than 0"),
        ("model.dropout=1", "model.dropout: 1 must be less than 1.0"),
        ("model.residual=kel", "model.residual: 'kel' must be one of keel, pre_ln, post_ln"),
        ("model.alpha=2 model.residual=pre_ln", "2.0 has no place in pre_ln"),
        ("model.first_block=v1 model.residual=post_ln", "v1 has no place in post_ln; keel only"),
        ("model.alpha=big", "model.alpha: 'big' must be one of auto, a number"),
        ("model.alpha=-1", "model.alpha: -1.0 must be auto or a positive number"),
        ("model.block=3", "model.block: is unknown; did you mean model.blocks?"),
        ("training.dropout=0.1", "training.dropout: is unknown; did you mean model.dropout?"),
        ("mode.blocks=3", "mode: is unknown; did you mean the section model?"),
        ("model.num_attention_heads=7", "7 must divide model.hidden_size = 64"),
        ("model.num_query_groups=3", "3 must divide model.num_attention_heads = 4"),
        ("parallel.tensor=3", "model.num_attention_heads: 4 must be a multiple of parallel.tensor"),
        ("parallel.sequence=true", "parallel.sequence: true needs parallel.tensor > 1"),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline: 2 needs parallel.pipeline > 1"),
        ("parallel.pipeline=9", "need at least 9 blocks; model.blocks = 8"),
        ("training.micro_batch_size=3", "16 must be a multiple of training.micro_batch_size = 3"),
        ("schedule.warmup_steps=4", "4 must be smaller than training.steps = 4"),
        ("schedule.min_learning_rate=1", "must not exceed optimizer.learning_rate"),
        ("training.name=a/b", "'a/b' may hold letters, digits"),
        ("data.text=[]", "data.text: () is empty"),
        ("data.text=3", "data.text: 3 is not a path or a list of paths"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: inf is not a finite number"),
        ("blocks=3", "blocks=3: an override is written section.key=value"),
        ("model.blocks", "model.blocks: an override is written section.key=value"),
        ("model.blocks=[1", "is not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named(config_file: Path, override: str, expected: str) -> None:
    found = complaints(config_file, *override.split(" "))
    assert any(expected in complaint for complaint in found)


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (3, ["parallel.pipeline=2"], "1 x 2 = 2 must divide the 3 process(es) of this launch"),
        (3, [], "16 must be a multiple of micro_batch_size x replicas = 2 x 3 = 6"),
        (
            3,
            ["parallel.pipeline=3", "parallel.virtual_pipeline=2"],
            "interleaving needs a multiple of parallel.pipeline = 3",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_launch_is_named(
    config_file: Path, world_size: int, overrides: list[str], expected: str
) -> None:
    found = complaints(config_file, *overrides, world_size=world_size)
    assert any(expected in complaint for complaint in found)


def test_every_problem_is_reported_at_once(config_file: Path) -> None:
    found = complaints(
        config_file, "model.blocks=0", "optimizer.lr=1", "nonsense", "training.precision=fp8"
    )
    assert [complaint.split(":")[0] for complaint in found] == [
        "nonsense",
        "model.blocks",
        "optimizer.lr",
        "training.precision",
    ]


def test_a_missing_setting_is_described(tmp_path: Path) -> None:
    sections = settings()
    del sections["training"]["steps"], sections["optimizer"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    found = complaints(path)
    assert "training.steps: is missing: Optimizer steps of the whole run." in found
    assert "optimizer: is missing: section; AdamW." in found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty; wanted are sections: model"),
        (b"- 1\n- 2\n", "is a list; wanted are sections"),
        (b"model: {blocks: 1\ndata: [", "is not valid YAML"),
        (b"model:\n  blocks: 1\n  blocks: 2\n", "'blocks' stands twice, on lines 2 and 3"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    (found,) = complaints(path)
    assert expected in found


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert complaints(tmp_path / "none.yaml") == ["file: cannot be read: No such file or directory"]


def test_overrides_are_yaml_and_the_last_wins(config_file: Path) -> None:
    config = load_config(
        config_file,
        ["optimizer.learning_rate=1e-3", "data.text=[a, b]", "model.blocks=4", "model.blocks=6"],
    )
    assert config.optimizer.learning_rate == 1e-3
    assert config.data.text == (Path("a"), Path("b"))
    assert config.model.blocks == 6
    assert load_config(config_file, ["data.text=a"]).data.text == (Path("a"),)
    assert load_config(config_file, ["data.text=null"]).data.text is None


def test_a_dumped_configuration_reads_back_equal(config_file: Path) -> None:
    config = load_config(config_file, ["data.text=[a, b]", "model.alpha=3.5"])
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


def test_alpha_is_twice_the_blocks_unless_it_is_given(config_file: Path) -> None:
    assert sub_layer(5, load_config(config_file).model).alpha == 16.0
    assert sub_layer(5, load_config(config_file, ["model.alpha=3"]).model).alpha == 3.0
    assert sub_layer(5, load_config(config_file, ["model.residual=deepnorm"]).model).alpha == 2.0


def test_every_setting_is_described_in_the_schema() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
        for key, setting in section["properties"].items():
            assert len(setting["description"]) > 10, key


def test_the_recipes_load() -> None:
    recipes = sorted(Path("yaml").rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        load_config(recipe)


def test_the_command_says_it_without_a_traceback(config_file: Path) -> None:
    command = [sys.executable, "-m", "keel_megatron", "config", "show", str(config_file)]
    wrong = subprocess.run([*command, "model.blocks=0"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.splitlines() == [
        f"error: {config_file}: 1 problem in the configuration",
        "  model.blocks: 0 must be greater than 0",
    ]
    right = subprocess.run(command, capture_output=True, text=True, check=True)
    assert right.stdout == dump_config(load_config(config_file))


def test_the_command_starts_without_torch() -> None:
    probe = "import sys, keel_megatron.cli.main; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)
