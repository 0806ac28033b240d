"""Small configurations for tests."""

from __future__ import annotations

from typing import Any

from keel_megatron.config.run import RunConfig

SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "blocks": 8,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 4,
    },
    "data": {"seq_length": 32, "vocab_size": 512},
    "optimizer": {"learning_rate": 3e-3},
    "training": {
        "name": "test",
        "steps": 4,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
    },
    # Profiles are drawn at a run's end, which takes longer than the run.
    "tracking": {"mlflow": False, "depth_every": 0},
}


def settings(**overrides: Any) -> dict[str, dict[str, Any]]:
    """The small run's sections, with overrides such as `model__blocks=4`."""
    sections = {name: dict(values) for name, values in SMALL.items()}
    for path, value in overrides.items():
        section, key = path.split("__", 1)
        sections.setdefault(section, {})[key] = value
    return sections


def small_config(**overrides: Any) -> RunConfig:
    """A small valid run, with overrides such as `model__blocks=4`."""
    return RunConfig.model_validate(settings(**overrides))
