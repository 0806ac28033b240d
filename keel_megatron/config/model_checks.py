"""Checks across the settings of `model`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from keel_megatron.architecture.residual import (
    RULES,
    SETTINGS,
    has_head_norms,
    rules_with,
    streams,
)
from keel_megatron.config.run import RunConfig


def _heads(config: RunConfig) -> Iterator[tuple[str, str]]:
    model = config.model
    if model.hidden_size % model.num_attention_heads:
        yield (
            "model.num_attention_heads",
            f"{model.num_attention_heads} must divide model.hidden_size = {model.hidden_size}",
        )
    elif model.head_dim % 2:
        yield (
            "model.num_attention_heads",
            f"hidden_size / heads = {model.head_dim} must be even for the rotary embedding",
        )


def _query_groups(config: RunConfig) -> Iterator[tuple[str, str]]:
    model = config.model
    if model.num_attention_heads % model.query_groups:
        yield (
            "model.num_query_groups",
            f"{model.query_groups} must divide model.num_attention_heads = "
            f"{model.num_attention_heads}",
        )


def _alpha(config: RunConfig) -> Iterator[tuple[str, str]]:
    alpha = config.model.alpha
    if alpha != "auto" and alpha <= 0:
        yield "model.alpha", f"{alpha} must be auto or a positive number"


def _rule_settings(config: RunConfig) -> Iterator[tuple[str, str]]:
    model = config.model
    for name, default in SETTINGS.items():
        value = getattr(model, name)
        if value != default and name not in RULES[model.residual].settings:
            yield (
                f"model.{name}",
                f"{_yaml(value)} is not supported by residual: {model.residual}; leave it at "
                f"{_yaml(default)}, or choose one of {', '.join(rules_with(name))}",
            )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _stream(config: RunConfig) -> Iterator[tuple[str, str]]:
    model = config.model
    if model.stream != "fp32" and streams(model) > 1:
        yield (
            "model.stream",
            f"{model.stream} is not supported by residual: {model.residual}, which has several "
            "streams; set it to fp32, or choose another rule",
        )


def _qk_norm(config: RunConfig) -> Iterator[tuple[str, str]]:
    model = config.model
    if model.qk_norm and has_head_norms(model):
        yield (
            "model.qk_norm",
            f"true is not supported by residual: {model.residual}, which normalizes queries and "
            "keys itself; set it to false",
        )


MODEL_CHECKS: tuple[Callable[[RunConfig], Iterator[tuple[str, str]]], ...] = (
    _heads,
    _query_groups,
    _alpha,
    _rule_settings,
    _stream,
    _qk_norm,
)
"""One check each, as in `checks.py`."""
