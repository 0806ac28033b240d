"""The sections themselves: their defaults, the contradictions between them, and their schema."""

from __future__ import annotations

import math
from typing import Any

import pydantic
import pytest

from keel_megatron.config import RunConfig
from keel_megatron.config.checks import problems
from keel_megatron.config.schema import json_schema
from tests.settings import settings, small_config


def contradictions(world_size: int | None = None, **overrides: Any) -> list[str]:
    return [path for path, _ in problems(small_config(**overrides), world_size)]


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        ({"model__num_attention_heads": 5, "model__num_query_groups": 5}, "num_attention_heads"),
        # 64 / 64 heads = 1 wide: no pair for the rotary embedding to turn.
        ({"model__num_attention_heads": 64}, "model.num_attention_heads"),
        ({"model__num_query_groups": 3}, "model.num_query_groups"),
        ({"model__num_query_groups": 1, "parallel__tensor": 2}, "model.num_query_groups"),
        ({"model__ffn_hidden_size": 129, "parallel__tensor": 2}, "model.ffn_hidden_size"),
        ({"data__vocab_size": 513, "parallel__tensor": 2}, "data.vocab_size"),
        ({"parallel__sequence": True}, "parallel.sequence"),
        (
            {"parallel__sequence": True, "parallel__tensor": 2, "data__seq_length": 33},
            "data.seq_length",
        ),
        ({"parallel__virtual_pipeline": 2}, "parallel.virtual_pipeline"),
        ({"parallel__pipeline": 4, "parallel__virtual_pipeline": 3}, "parallel.pipeline"),
        ({"parallel__pipeline": 2, "parallel__layout": [8]}, "parallel.layout"),
        ({"parallel__pipeline": 2, "parallel__layout": [3, 4]}, "parallel.layout"),
        ({"parallel__pipeline": 3, "parallel__layout": [4, 0, 4]}, "parallel.layout"),
        ({"training__micro_batch_size": 5}, "training.global_batch_size"),
        ({"schedule__warmup_steps": 4}, "schedule.warmup_steps"),
        (
            {
                "schedule__decay": "wsd",
                "schedule__decay_fraction": 0.75,
                "schedule__warmup_steps": 2,
            },
            "schedule.decay_fraction",
        ),
        ({"schedule__min_learning_rate": 4e-3}, "schedule.min_learning_rate"),
        ({"training__hang_timeout": 600.0}, "training.hang_timeout"),
        (
            {"kernels__attention": "flash", "kernels__backend": "transformer_engine"},
            "kernels.attention",
        ),
        (
            {"kernels__attention": "cudnn", "training__deterministic": True},
            "kernels.attention",
        ),
        (
            {"training__deterministic": True, "kernels__backend": "transformer_engine"},
            "training.deterministic",
        ),
        ({"guard__min_steps": 64, "guard__window": 32}, "guard.min_steps"),
        ({"tracking__uri": "https://me:secret@host:5000/x"}, "tracking.uri"),
        ({"tracking__uri": "https://token@host"}, "tracking.uri"),
        ({"tracking__uri": "postgresql+psycopg2://me:secret@db/runs"}, "tracking.uri"),
        ({"tracking__uri": "postgresql://me:sec/ret@db/runs"}, "tracking.uri"),
        ({"tracking__uri": "postgresql://db/runs?user=me&password=secret"}, "tracking.uri"),
    ],
)
def test_a_contradiction_is_found_alone(overrides: dict[str, Any], path: str) -> None:
    (found,) = contradictions(**overrides)
    assert found.endswith(path)


@pytest.mark.parametrize(
    "overrides",
    [
        {"parallel__tensor": 2, "parallel__sequence": True},
        # As many chunks as blocks; the embedding and the head alone; blocks that do not divide.
        {"parallel__pipeline": 4, "parallel__virtual_pipeline": 2},
        {"parallel__pipeline": 5, "parallel__virtual_pipeline": 2},
        {"parallel__pipeline": 3, "parallel__layout": [0, 8, 0]},
        {"parallel__pipeline": 3, "model__blocks": 7},
        {"model__num_query_groups": None},
        {"schedule__warmup_steps": 3},
        {
            "schedule__decay": "wsd",
            "schedule__decay_fraction": 0.5,
            "schedule__warmup_steps": 2,
        },
        # Nothing decays to it.
        {"schedule__decay": "constant", "schedule__min_learning_rate": 4e-3},
        {"model__residual": "deepnorm", "model__alpha": 2.0},
        {"tracking__uri": "postgresql://me@db/runs"},
        {"tracking__uri": "sqlite:////home/a:b@c/mlflow.db"},
    ],
)
def test_what_fits_is_not_refused(overrides: dict[str, Any]) -> None:
    assert contradictions(**overrides) == []


@pytest.mark.parametrize(
    ("world_size", "layout", "wrong"),
    [
        (8, {}, []),
        (16, {}, ["training.global_batch_size"]),
        (4, {"parallel__tensor": 2, "parallel__pipeline": 2}, []),
        (6, {"parallel__tensor": 2, "parallel__pipeline": 2}, ["parallel.tensor x"]),
        (4, {"parallel__pipeline": 4, "parallel__virtual_pipeline": 2}, []),
        # 16 sequences are 4 micro-batches of 2 on each of 2 replicas, and 3 stages interleave.
        (
            6,
            {"parallel__pipeline": 3, "parallel__virtual_pipeline": 2},
            ["training.global_batch_size"],
        ),
    ],
)
def test_the_layout_is_checked_against_the_launch(
    world_size: int, layout: dict[str, Any], wrong: list[str]
) -> None:
    found = contradictions(world_size, **layout)
    assert len(found) == len(wrong)
    assert all(path.startswith(start) for path, start in zip(found, wrong, strict=True))


def test_derived_sizes() -> None:
    config = small_config(model__num_query_groups=None, parallel__tensor=2, parallel__pipeline=2)
    assert (config.model.sub_layers, config.model.head_dim, config.model.query_groups) == (
        16,
        16,
        4,
    )
    assert config.data_parallel_size(8) == 2


def test_a_configuration_never_changes() -> None:
    config = small_config()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.model.blocks = 3  # type: ignore[misc]


def test_every_setting_is_described_in_the_schema() -> None:
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["title"] == "Keel-Megatron run"
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
        for key, setting in section["properties"].items():
            assert len(setting["description"]) > 10, key


_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """Whether a setting's schema takes a value: as much of JSON schema as ours uses."""
    if "anyOf" in schema:
        return any(accepts(option, value) for option in schema["anyOf"])
    if "$ref" in schema:
        return accepts(json_schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")], value)
    if isinstance(value, bool) != (schema["type"] == "boolean"):
        return False
    if not isinstance(value, _TYPES[schema["type"]]):
        return False
    if schema["type"] == "array" and not all(accepts(schema["items"], item) for item in value):
        return False
    if schema["type"] == "object":
        inner = schema["properties"]
        known = value.keys() <= inner.keys() and value.keys() >= set(schema.get("required", ()))
        return known and all(accepts(inner[key], one) for key, one in value.items())
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if schema["type"] in ("integer", "number"):
        return (
            schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
            and schema.get("exclusiveMinimum", -math.inf) < value
            and value < schema.get("exclusiveMaximum", math.inf)
        )
    return True


def setting_schema(section: str, key: str) -> dict[str, Any]:
    schema = json_schema()
    name = schema["properties"][section]["$ref"].removeprefix("#/$defs/")
    found: dict[str, Any] = schema["$defs"][name]["properties"][key]
    return found


@pytest.mark.parametrize("sections", [settings(), small_config().model_dump(mode="json")])
def test_the_schema_takes_what_loads(sections: dict[str, dict[str, Any]]) -> None:
    for section, values in sections.items():
        for key, value in values.items():
            assert accepts(setting_schema(section, key), value), (section, key, value)


@pytest.mark.parametrize(
    ("section", "key", "good", "bad"),
    [
        ("data", "text", ["a", ["a", "b"], None], [3, [3], True]),
        ("model", "alpha", ["auto", 3, 3.5], ["big", None, True]),
        ("model", "blocks", [1], [0, 1.5, "1", True, None]),
        ("model", "residual", ["keel", "deepnorm"], ["kel"]),
        ("model", "num_query_groups", [2, None], [0, "2"]),
        ("model", "dropout", [0, 0.5], [1, -0.1]),
        ("tracking", "mlflow", [True], [1, "true"]),
        ("optimizer", "rates", [{}, {"head": 0.5}], [0.5, {"heads": 0.5}, {"head": -1}, None]),
        (
            "optimizer",
            "depth_rates",
            [[], [{"blocks": [0, 7], "factor": 0}]],
            [{}, [{"factor": 1}], [{"blocks": 3, "factor": 1}]],
        ),
        (
            "schedule",
            "rampup_batch_size",
            [None, {"start": 2, "increment": 2, "samples": 9}],
            [2, {"start": 2, "increment": 2}, {"start": 0, "increment": 2, "samples": 9}],
        ),
    ],
)
def test_the_schema_and_the_loader_agree(
    section: str, key: str, good: list[Any], bad: list[Any]
) -> None:
    schema = setting_schema(section, key)
    model = RunConfig.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, pydantic.BaseModel)
    for values, expected in ((good, True), (bad, False)):
        for value in values:
            assert accepts(schema, value) is expected, value
            given = {**settings().get(section, {}), key: value}
            try:
                model.model_validate(given)
                loads = True
            except pydantic.ValidationError:
                loads = False
            assert loads is expected, value


def test_the_schema_requires_what_has_no_default() -> None:
    schema = json_schema()
    assert schema["required"] == ["model", "data", "optimizer", "training"]
    required = schema["$defs"]["TrainingConfig"]["required"]
    assert required == ["name", "steps", "global_batch_size"]


@pytest.mark.parametrize("uri", ["nonsense", "htp://host:5000", "host:5000"])
def test_a_tracking_uri_of_no_known_kind_is_refused(uri: str) -> None:
    found = dict(problems(RunConfig.model_validate(settings(tracking__uri=uri))))
    assert "is not a store type of MLflow" in found["tracking.uri"]


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000",
        "sqlite:////a/b.db",
        "sqlite:////a@b/c#1.db?timeout=5",
        "databricks",
        "databricks://profile",
        "postgresql://me@db/runs?sslmode=require",
    ],
)
def test_a_tracking_uri_of_a_known_kind_is_taken(uri: str) -> None:
    assert not dict(problems(RunConfig.model_validate(settings(tracking__uri=uri))))


def test_an_evaluation_has_tasks() -> None:
    assert small_config(evaluation__every=5, evaluation__tasks="piqa").evaluation.tasks == ("piqa",)
    with pytest.raises(pydantic.ValidationError, match=r"evaluation.every needs evaluation.tasks"):
        small_config(evaluation__every=5)
