"""Error messages for pydantic's errors: the setting, its value, and what would be valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from keel_megatron.config.data import SourceConfig
from keel_megatron.config.optimizer import DepthRateConfig, RampupConfig, RatesConfig
from keel_megatron.config.run import RunConfig
from keel_megatron.config.yaml_text import read_yaml, shown
from keel_megatron.errors import Problem

_INTEGER, _NUMBER, _SWITCH = "is not an integer", "is not a number", "is not true or false"
_TEXT, _PATH = "is not text", "is not a path"
_SECTION = "is not a section of key: value lines"
_KINDS = {
    "int_type": _INTEGER,
    "int_from_float": _INTEGER,
    "int_parsing": _INTEGER,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "is not a finite number",
    "bool_type": _SWITCH,
    "bool_parsing": _SWITCH,
    "string_type": _TEXT,
    "path_type": _PATH,
    "is_instance_of": _PATH,
    "tuple_type": "is not a path or a list of paths",
    "too_short": "is empty; give at least one, or null for the default",
    "string_too_short": "is empty",
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "dict_type": _SECTION,
    "string_pattern_mismatch": (
        "must start with a letter or digit and contain only letters, digits, '.', '_' and '-'"
    ),
}
_MAY_HOLD_SECRETS = ("tracking.uri",)
"""Settings whose values are not shown."""
_INNER: dict[tuple[str, ...], tuple[type[BaseModel], int]] = {
    ("data", "sources"): (SourceConfig, 4),
    ("optimizer", "rates"): (RatesConfig, 3),
    ("optimizer", "depth_rates"): (DepthRateConfig, 4),
    ("schedule", "rampup_batch_size"): (RampupConfig, 3),
}
"""Settings with settings of their own, and the parts of their paths: data.sources.NUMBER.KEY."""
_LISTS = {
    "data.sources": "sources, each with a path, such as [{path: web}, {path: books}]",
    "optimizer.depth_rates": (
        "ranges of blocks, each with a factor, such as [{blocks: [0, 7], factor: 0.5}]"
    ),
}
_BOUNDS = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}


def translate(errors: Sequence[ErrorDetails]) -> list[Problem]:
    """One problem per setting, in the order of the errors."""
    found: dict[str, Problem] = {}
    for error in errors:
        if error["type"] == "too_short" and error["input"]:
            continue  # its elements have errors, which are reported
        problem = _translate(error)
        # A setting of several types has an error for each: the first suffices, except for infinity.
        if problem.path not in found or error["type"] == "finite_number":
            found[problem.path] = problem
    return list(found.values())


def suggestion(section: str, key: str) -> str:
    """A suggestion for an unknown setting, as the end of a message.

    The same key in another section first, then a similar key in its own, then in the others.
    """
    own = _section(section)
    if own is None:
        return ""
    everywhere = {name: f"{other}.{name}" for other, name in _settings()}
    near: str | None = everywhere.get(key)
    if near is None:
        near = _nearest(key, {name: f"{section}.{name}" for name in own.model_fields}, 0.6)
    near = near or _nearest(key, everywhere, 0.8)
    return f"; did you mean {near}?" if near else _known(own)


def section_suggestion(name: str) -> str:
    """A suggestion for an unknown section, as the end of a message."""
    everywhere = {key: f"{section}.{key}" for section, key in _settings()}
    if name in everywhere:
        return f"; did you mean {everywhere[name]}?"
    near = _nearest(name, {section: f"the section {section}" for section in _sections()}, 0.6)
    near = near or _nearest(name, everywhere, 0.8)
    return f"; did you mean {near}?" if near else _known(RunConfig)


def _translate(error: ErrorDetails) -> Problem:
    location, kind, value = [str(part) for part in error["loc"]], error["type"], error["input"]
    if kind == "invalid_key":  # such as `on`, which is true in YAML; the input is the key
        location[-1] = shown(value)
    inner, parts = _INNER.get(tuple(location[:2]), (None, 2))
    path = ".".join(location[:parts])
    if kind in ("extra_forbidden", "invalid_key"):
        if inner is not None and len(location) >= parts:
            near = _inner_suggestion(inner, location[parts - 1])
        else:
            near = suggestion(*location[:2]) if len(location) > 1 else section_suggestion(path)
        return Problem(path, f"is unknown{near}")
    if kind == "missing":
        return Problem(path, f"is missing: {_description(location)}")
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return Problem(path, f"{shown(value)} {words} {error['ctx'][key]}")
    if kind == "literal_error":
        return Problem(path, f"{shown(value)} must be {_choices(location)}{_quotes(value)}")
    words = _KINDS.get(kind, error["msg"].removeprefix("Value error, "))
    if kind == "value_error" and isinstance(value, dict):  # several settings do not fit together
        return Problem(path, words)
    if kind == "tuple_type" and path in _LISTS:
        words = f"is not a list of {_LISTS[path]}"
    if words == _INTEGER and isinstance(value, float) and value.is_integer():
        words += f" (write {value:.0f})"
    if words == _TEXT and value is not None:
        words += " (put it in quotes)"
    if words in (_INTEGER, _NUMBER, _SWITCH):
        words += _quotes(value)
    if path in _MAY_HOLD_SECRETS:
        return Problem(path, words)
    return Problem(path, f"{shown(str(value) if isinstance(value, Path) else value)} {words}")


def _quotes(value: Any) -> str:
    """A hint, if the value is text because of its quotes or is not a decimal number."""
    if not isinstance(value, str):
        return ""
    try:
        bare = read_yaml(value)
    except ValueError:
        return ""
    if isinstance(bare, (bool, int, float)):
        return " (remove the quotes)"
    if value.lower() in _YAML_1_1:
        return f" (write {_YAML_1_1[value.lower()]})"
    for base in (10, 0):  # 0100, then 0x1f, 0o17 and 0b1
        with suppress(ValueError):
            return f" (write {int(value, base)})"
    return ""


_YAML_1_1 = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def _sections() -> Iterator[str]:
    yield from RunConfig.model_fields


def _settings() -> Iterator[tuple[str, str]]:
    """Every setting as (section, key)."""
    for name in _sections():
        section = _section(name)
        for key in section.model_fields if section else ():
            yield name, key


def _section(name: str) -> type[BaseModel] | None:
    field = RunConfig.model_fields.get(name)
    annotation = field.annotation if field else None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _nearest(name: str, known: dict[str, str], cutoff: float) -> str | None:
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return known[near[0]] if near else None


def _known(model: type[BaseModel]) -> str:
    return f"; known are {', '.join(model.model_fields)}"


def _inner_suggestion(inner: type[BaseModel], key: str) -> str:
    """A suggestion for an unknown key within a setting that has settings of its own."""
    near = _nearest(key, {name: name for name in inner.model_fields}, 0.6)
    return f"; did you mean {near}?" if near else _known(inner)


def _described(location: list[str]) -> tuple[type[BaseModel] | None, str]:
    """The model that has a setting, and its key there."""
    inner, parts = _INNER.get(tuple(location[:2]), (None, 2))
    if inner is not None and len(location) >= parts:
        return inner, location[parts - 1]
    return _section(location[0]), location[1]


def _description(location: list[str]) -> str:
    section, key = _described(location)
    return str(section.model_fields[key].description) if section else ""


def _choices(location: list[str]) -> str:
    """The choices of a setting, from its annotation."""
    section, key = _described(location)
    annotation = section.model_fields[key].annotation if section else None
    words = [str(choice) for choice in _literals(annotation)]
    return " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"


def _literals(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        if isinstance(argument, (str, int)):
            yield argument
        elif argument is float:
            yield "a number"
        else:
            yield from _literals(argument)
