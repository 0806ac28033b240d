"""Wrong configurations: every problem at once, each with its setting and what would be right."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

import yaml
from keel_megatron.architecture.residual import alpha as skip_scale
from keel_megatron.config import ConfigError, RunConfig, dump_config, load_config, parse_config
from keel_megatron.config.parallel import ParallelConfig
from keel_megatron.config.yaml_text import read_yaml
from tests.settings import settings, small_config


def complaints(path: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.blocks=many", "model.blocks: 'many' is not an integer"),
        ('model.blocks="8"', "model.blocks: '8' is not an integer (remove the quotes)"),
        ("model.blocks=8.5", "model.blocks: 8.5 is not an integer"),
        ("training.seed=true", "training.seed: true is not an integer"),
        ("model.blocks=8.0", "model.blocks: 8.0 is not an integer (write 8)"),
        ("model.blocks=e", "model.blocks: 'e' is not an integer"),
        ("model.blocks=null", "model.blocks: null is not an integer"),
        ("model.blocks=0100", "model.blocks: '0100' is not an integer (write 100)"),
        ("model.blocks=0x10", "model.blocks: '0x10' is not an integer (write 16)"),
        ("model.blocks=0o17", "model.blocks: '0o17' is not an integer (write 15)"),
        ("model.blocks=1:30", "model.blocks: '1:30' is not an integer"),
        ("model.blocks=1__0", "model.blocks: '1__0' is not an integer"),
        ("tracking.mlflow=yes", "tracking.mlflow: 'yes' is not true or false (write true)"),
        ("tracking.mlflow=Off", "tracking.mlflow: 'Off' is not true or false (write false)"),
        ("training.name=[a]", "training.name: [a] is not text (put it in quotes)"),
        (
            "data.cache_dir=~no-such-user/x",
            "begins with the home folder of a user who does not exist",
        ),
        (r'data.text="a\0b"', "contains a NUL character, which a path cannot contain"),
        ("data.text=~", "data.text: '~' is null in YAML, not a folder; write null, or a full"),
        ("model.blocks=0", "model.blocks: 0 must be greater than 0"),
        ("model.dropout=1", "model.dropout: 1 must be less than 1.0"),
        ("model.residual=kel", "model.residual: 'kel' must be one of keel, pre_ln, post_ln"),
        ("model.alpha=2 model.residual=pre_ln", "2.0 is not supported by residual: pre_ln"),
        ("model.first_block=v1 model.residual=post_ln", "v1 is not supported by residual: post_ln"),
        (
            "model.qk_norm=true model.residual=hybrid_norm",
            "model.qk_norm: true is not supported by residual: hybrid_norm",
        ),
        ("training.z_loss=-1", "training.z_loss: "),
        ("model.base_blocks=8", "8 is not supported by residual: keel; leave it at 2, or choose"),
        ("model.embedding_norm=true", "true is not supported by residual: keel; leave it at false"),
        ("model.expansion_rate=2", "leave it at 4, or choose one of hyper_connections"),
        (
            "model.residual=hyper_connections model.stream=bf16",
            "bf16 is not supported by residual: hyper_connections",
        ),
        ("model.alpha=big", "model.alpha: 'big' must be auto or a number"),
        ('model.alpha="2"', "model.alpha: '2' must be auto or a number (remove the quotes)"),
        ("model.alpha=.nan", "model.alpha: .nan is not a finite number"),
        ("training.precision=fp8", "training.precision: 'fp8' must be fp32 or bf16"),
        ("training.name=12", "12 is not text (put it in quotes)"),
        ("training.name=null", "training.name: null is not text"),
        ("tracking.mlflow=1", "tracking.mlflow: 1 is not true or false"),
        ("model.alpha=-1", "model.alpha: -1.0 must be auto or a positive number"),
        ("model.block=3", "model.block: is unknown; did you mean model.blocks?"),
        ("training.dropout=0.1", "training.dropout: is unknown; did you mean model.dropout?"),
        ("training.learning_rte=1", "is unknown; did you mean optimizer.learning_rate?"),
        ("optimizer.lr=1", "optimizer.lr: is unknown; known are name, learning_rate"),
        ("data.on=1", "data.on: is unknown; known are text"),
        ("network.blocks=3", "network: is unknown; known are model, parallel"),
        ("mode.blocks=3", "mode: is unknown; did you mean the section model?"),
        ("model.num_attention_heads=7", "7 must divide model.hidden_size = 64"),
        ("model.num_query_groups=3", "3 must divide model.num_attention_heads = 4"),
        ("parallel.tensor=3", "model.num_attention_heads: 4 must be a multiple of parallel.tensor"),
        ("parallel.sequence=true", "parallel.sequence: true needs parallel.tensor > 1"),
        (
            "parallel.overlap_param_gather=true parallel.distributed_optimizer=false",
            "parallel.overlap_param_gather: true needs parallel.distributed_optimizer: true",
        ),
        (
            "parallel.overlap_grad_reduce=true training.engine=deepspeed",
            "parallel.overlap_grad_reduce: is not supported with training.engine: deepspeed",
        ),
        (
            "optimizer.name=muon training.engine=deepspeed",
            "optimizer.name: is not supported with training.engine: deepspeed",
        ),
        (
            "optimizer.name=muon parallel.overlap_grad_reduce=true",
            "parallel.overlap_grad_reduce: is not supported with optimizer.name: muon",
        ),
        (
            "optimizer.name=muon parallel.overlap_param_gather=true",
            "parallel.overlap_param_gather: is not supported with optimizer.name: muon",
        ),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline: 2 needs parallel.pipeline > 1"),
        ("parallel.pipeline=11", "need at least 9 blocks; model.blocks = 8"),
        (
            "parallel.layout=[3,5]",
            "2 numbers; parallel.pipeline x parallel.virtual_pipeline = 1 x 1",
        ),
        ("parallel.layout=[7]", "the sum is 7 blocks; model.blocks = 8"),
        ("parallel.layout=[-8]", "parallel.layout"),
        ("training.micro_batch_size=3", "16 must be a multiple of training.micro_batch_size = 3"),
        ("schedule.warmup_steps=4", "4 must be smaller than training.steps = 4"),
        ("schedule.min_learning_rate=1", "must not exceed optimizer.learning_rate"),
        ("training.name=a/b", "'a/b' must start with a letter or digit"),
        ("data.text=[]", "data.text: [] is empty"),
        ("data.text=[a,3]", "data.text: 3 is not a path"),
        ('data.text=""', "data.text: '' is not a path"),
        ("data.tokenizer=3", "data.tokenizer: 3 is not a path"),
        ("data.text=3", "data.text: 3 is not a path or a list of paths"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: .inf is not a finite number"),
        ("blocks=3", "an override must be section.key=value; did you mean model.blocks?"),
        ("=3", "=3: an override must be section.key=value"),
        ("model.=3", "model.=3: an override must be section.key=value"),
        ("model.a.b=3", "model.a.b=3: an override must be section.key=value"),
        ("model.blocks", "model.blocks: an override must be section.key=value"),
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


def test_a_wrong_setting_hides_no_contradiction_of_others(config_file: Path) -> None:
    found = complaints(
        config_file,
        "model.blocks=0",
        "model.num_attention_heads=7",
        "parallel.pipeline=9",  # needs the blocks: unknown
        "schedule.warmup_steps=4",
        "training.steps=many",  # so of the warm-up nothing is known either
        "training.micro_batch_size=3",
        world_size=5,
    )
    assert [complaint.split(":")[0] for complaint in found] == [
        "model.blocks",
        "training.steps",
        "model.num_attention_heads",
        "model.num_query_groups",
        "training.global_batch_size",
        "parallel.tensor x parallel.pipeline",
    ]


def test_a_wrong_setting_is_not_taken_for_its_default(config_file: Path) -> None:
    # With sequence's default, false, nothing would be wrong; with tensor's, 1, sequence would.
    found = complaints(config_file, "parallel.tensor=two", "parallel.sequence=true")
    assert found == ["parallel.tensor: 'two' is not an integer"]


def test_a_section_that_is_no_mapping_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings(), "parallel": 3}))
    wanted = ["parallel: 3 is not a section of key: value lines"]
    assert complaints(path) == wanted
    assert complaints(path, "parallel.tensor=2") == wanted


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings(), "parallel": None}))
    assert load_config(path).parallel == ParallelConfig()
    assert load_config(path, ["parallel.pipeline=2"]).parallel.pipeline == 2


def test_a_setting_outside_its_section_is_sent_there(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings(), "seed": 3, 1: 2}))
    first, second = complaints(path)
    assert first == "seed: is unknown; did you mean training.seed?"
    assert second.startswith("1: is unknown; known are model, parallel")


def test_a_word_that_yaml_takes_for_true_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings()).replace("data:", "data:\n  true: 3"))
    (found,) = complaints(path)
    assert found.startswith("data.true: is unknown; known are text, sources, dataset")


def test_a_merged_key_is_not_a_double_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{yaml.safe_dump(settings())}\ncheckpoint: {{<<: {{keep: 3}}, keep: 4}}\n")
    assert load_config(path).checkpoint.keep == 4


def test_a_missing_setting_is_described(tmp_path: Path) -> None:
    sections = settings()
    del sections["training"]["steps"], sections["optimizer"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections))
    found = complaints(path)
    assert "training.steps: is missing: Optimizer steps of the whole run." in found
    assert "optimizer.learning_rate: is missing: Peak learning rate." in found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty; expected sections: model"),
        (b"- 1\n- 2\n", "is not a mapping: [1, 2]; expected sections"),
        (b"model: {blocks: 1\ndata: [", "is not valid YAML: while parsing a flow mapping"),
        (b"model:\n\tblocks: 1", "(line 2, column 1)"),
        (b"model: 1\nx: '\x07'", "the character #x0007 is not allowed (line 2)"),
        (b"x: " + b"[" * 5000, "it is nested more than 32 levels deep (line 1, column 35)"),
        (b"a: 1\n---\nb: 1", "expected a single document"),
        (b"model:\n  blocks: 1\n  blocks: 2\n", "'blocks' is duplicated, on lines 2 and 3"),
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


# Text that YAML would read as something else, were it dumped without quotes.
_texts = st.one_of(
    st.sampled_from(
        [
            "1e3",
            "-1E-5",
            ".5e1",
            "12",
            "0x1f",
            "null",
            "yes",
            "",
            " a",
            "1:30",
            "a: b",
            "\x85",
            "a\u2028b\n",
            "1_000.5e3",
            "0100",
            "=",
            "~",
            "TRUE",
            "2024-01-31",
        ]
    ),
    st.text(st.characters(codec="utf-8")),
)


# No path has a NUL in it, and ~name is somebody's home folder.
_paths = _texts.filter(lambda text: text and "\0" not in text and not text.startswith("~"))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    prompt=st.none() | _texts,
    text=st.none() | st.lists(_paths, min_size=1, max_size=3),
    name=st.sampled_from(["1e3", "7E-2", "12", "null", "0b1", "2024-01-31", "off"]),
    rate=st.floats(min_value=1e-7, max_value=1e30),
    alpha=st.just("auto") | st.floats(min_value=1e-30, max_value=1e30),
)
def test_a_dumped_configuration_reads_back_equal(
    prompt: str | None, text: list[str] | None, name: str, rate: float, alpha: float | str
) -> None:
    config = small_config(
        tracking__sample_prompt=prompt,
        data__text=text,
        training__name=name,
        optimizer__learning_rate=rate,
        model__alpha=alpha,
    )
    assert parse_config(read_yaml(dump_config(config)), "dump") == config


def test_a_dump_is_whole_and_in_order(config_file: Path) -> None:
    dumped = read_yaml(dump_config(load_config(config_file, ["data.text=a"])))
    assert list(dumped) == list(RunConfig.model_fields)
    assert dumped["data"]["text"] == ["a"]
    assert dumped["training"]["runs_dir"] == "runs"
    assert list(dumped["model"]) == list(RunConfig.model_fields["model"].annotation.model_fields)


def test_alpha_is_twice_the_blocks_unless_it_is_given(config_file: Path) -> None:
    assert skip_scale(load_config(config_file).model) == 16.0
    assert skip_scale(load_config(config_file, ["model.alpha=3"]).model) == 3.0
    assert skip_scale(load_config(config_file, ["model.residual=deepnorm"]).model) == 2.0


def test_the_recipes_load() -> None:
    """Those of yaml/evaluation are lm-eval's task files."""
    recipes = sorted(set(Path("yaml").rglob("*.yaml")) - set(Path("yaml/evaluation").iterdir()))
    assert recipes
    for recipe in recipes:
        load_config(recipe)
