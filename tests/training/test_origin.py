"""What `training.initialize_from` may name, and which origins are refused at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.identity import check_identity, claim
from keel_megatron.config.load import dump_config, parse_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import ConfigError, UserError
from keel_megatron.training.origin import Place, check_origin, locate, tokenizer_of
from tests.checkpoint.samples import write_checkpoint
from tests.datasets import tokenizer_model
from tests.huggingface.models import write_run
from tests.settings import settings, small_config


def origin_run(home: Path, **overrides: Any) -> RunConfig:
    """A run with checkpoints of steps 2 and 4."""
    config = small_config(training__name="first", training__runs_dir=str(home), **overrides)
    claim(config)
    for step in (2, 4):
        write_checkpoint(config.training.folder, step, config=dump_config(config).encode())
    return config


def start_from(home: Path, origin: str, **overrides: Any) -> RunConfig:
    return small_config(
        training__name="second",
        training__runs_dir=str(home),
        training__initialize_from=str(home / origin),
        **overrides,
    )


def test_a_run_a_step_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    run = origin_run(tmp_path).training.folder
    last = folder.step_folder(run, 4)
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    assert locate(run) == Place("run", run)
    assert locate(Path(f"{run}@2")) == Place("checkpoint", folder.step_folder(run, 2))
    assert locate(last) == Place("checkpoint", last)
    assert locate(exported) == Place("huggingface", exported)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("absent", "does not exist"),
        ("first@3", r"there is no .*step_00000003; steps of .*first: 2, 4"),
        ("absent@3", "steps of .*absent: none"),
        ("text", "does not exist, or is not a folder"),
        ("nothing", "neither a run with checkpoints, nor a checkpoint, nor a Hugging"),
        ("begun", "has no complete checkpoint"),
    ],
)
def test_what_is_no_origin_is_refused(given: str, why: str, tmp_path: Path) -> None:
    origin_run(tmp_path)
    (tmp_path / "text").write_text("text")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=f"^training.initialize_from: .*{why}"):
        check_origin(start_from(tmp_path, given))


def test_all_differences_of_the_model_are_named_together(tmp_path: Path) -> None:
    origin_run(tmp_path)
    other = {"model__blocks": 4, "model__rope_theta": 5e5, "data__vocab_size": 320}
    with pytest.raises(UserError) as refused:
        check_origin(start_from(tmp_path, "first", **other))
    lines = str(refused.value).splitlines()
    assert lines[1:-1] == [
        "  model.blocks: 8 there, 4 here",
        "  model.alpha: 16.0 there, 8.0 here",  # auto: the number of sub-layers
        "  model.rope_theta: 10000.0 there, 500000.0 here",
        "  data.vocab_size: 512 there, 320 here",
    ]


def test_what_the_weights_do_not_depend_on_may_differ(tmp_path: Path) -> None:
    """Defaults count as what they stand for."""
    origin_run(tmp_path)
    alike = {"model__alpha": 16.0, "model__num_query_groups": None, "model__init_std": 0.5}
    free = {"model__dropout": 0.1, "data__seq_length": 64, "parallel__tensor": 2}
    check_origin(start_from(tmp_path, "first@2", **alike, **free, training__precision="bf16"))


def test_moments_are_kept_only_where_there_are_some(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.keep_optimizer: .*initialize_from"):
        parse_config(settings(training__keep_optimizer=True), "run.yaml")
    write_run(tmp_path / "imported", b"model", model__blocks=8)
    plain = {"model__num_query_groups": 2}
    check_origin(start_from(tmp_path, "imported", **plain))
    with pytest.raises(UserError, match=r"training\.keep_optimizer: .*no optimizer state"):
        check_origin(start_from(tmp_path, "imported", **plain, training__keep_optimizer=True))


def test_moments_of_another_optimizer_are_not_kept(tmp_path: Path) -> None:
    origin_run(tmp_path)
    check_origin(start_from(tmp_path, "first", optimizer__name="muon"))
    kept = start_from(tmp_path, "first", optimizer__name="muon", training__keep_optimizer=True)
    with pytest.raises(UserError, match=r"training\.keep_optimizer: .*optimizer\.name: adamw"):
        check_origin(kept)


def test_a_run_with_a_checkpoint_does_not_look_at_its_origin(tmp_path: Path) -> None:
    config = start_from(tmp_path, "absent")
    claim(config)
    write_checkpoint(config.training.folder, 1)
    check_origin(config)
    without = config.training.model_copy(update={"initialize_from": None})
    check_identity(
        config.training.folder / "config.yaml", config.model_copy(update={"training": without})
    )


def test_a_refused_resume_names_the_way_to_start_from_the_weights(tmp_path: Path) -> None:
    saved = origin_run(tmp_path).training.folder / "config.yaml"
    with pytest.raises(UserError, match=r"training\.name, and training\.initialize_from"):
        check_identity(saved, small_config(training__seed=7))
    with pytest.raises(UserError, match=r"another training\.name, or move"):
        check_identity(saved, small_config(training__seed=7, model__blocks=2))


def test_the_tokenizer_of_an_earlier_versions_checkpoint_is_known_by_its_hash(
    tmp_path: Path,
) -> None:
    state = {"data": {"files": {"tokenizer.model": {"bytes": 1, "sha256": "ab"}}}}
    found = tokenizer_of(tmp_path, json.loads(json.dumps(state)))
    assert found is not None
    assert found.sha256 == "ab"
    assert tokenizer_of(tmp_path, {}) is None


def test_another_tokenizer_is_refused_before_a_dataset_is_built(tmp_path: Path) -> None:
    """Whether it is given, or would be trained on other text."""
    write_run(tmp_path / "first", tokenizer_model(), model__blocks=8)
    alike = {"model__num_query_groups": 2}
    own = folder.step_folder(tmp_path / "first", 0) / "tokenizer.model"
    (tmp_path / "other.model").write_bytes(tokenizer_model(300))
    check_origin(start_from(tmp_path, "first", **alike))  # the same data
    check_origin(start_from(tmp_path, "first", **alike, data__tokenizer=str(own)))
    given = {"data__tokenizer": str(tmp_path / "other.model")}
    remedy = f"set data.tokenizer={own}"
    with pytest.raises(UserError, match=rf"is not data\.tokenizer, .*other\.model; {remedy}"):
        check_origin(start_from(tmp_path, "first", **alike, **given))
    with pytest.raises(UserError, match=rf"would be trained on this run's data; {remedy}"):
        check_origin(start_from(tmp_path, "first", **alike, data__text="new.txt"))
