"""The page of settings, from the configuration models' own descriptions, types and defaults."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from keel_megatron.config import RunConfig

HEAD = """\
# Settings

A run's configuration is a YAML file with a section for each heading below. On the command line,
`section.key=value` replaces a setting of the file: `keel train yaml/demo.yaml training.steps=10`.
`keel config show CONFIG` prints all settings of a run with their values, or every error.
`keel config schema` prints a JSON schema, with which editors complete and check the file.

Unknown settings are errors. Settings without a default are required, and so are the sections
{required}. Types are strict: `8.5` and `"8"` are not integers.
"""
_NAMES: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true, false"}
_BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


def page() -> str:
    """The page docs/reference/settings.md."""
    sections = RunConfig.model_fields
    required = ", ".join(f"`{name}`" for name, field in sections.items() if field.is_required())
    parts = [HEAD.format(required=required)]
    for name, field in sections.items():
        model: Any = field.annotation
        parts.append(_section(name, name, field.description or "", model))
        for key, inner in nested(model):
            many = "an entry of " if "list" in kind(model.model_fields[key]) else ""
            text = f"The keys of {many}`{name}.{key}`:"
            parts.append(_section(f"{name}.{key}", f"{name}.{key}", text, inner, level=3))
    return "\n".join(parts)


def nested(model: Any) -> list[tuple[str, type[BaseModel]]]:
    """Settings of a section that have keys of their own, with their models."""
    found = []
    for key, field in model.model_fields.items():
        inner = [one for one in _leaves(field.annotation) if _is_model(one)]
        found += [(key, one) for one in inner]
    return found


def _section(title: str, path: str, text: str, model: Any, level: int = 2) -> str:
    lines = [f"{'#' * level} {title}\n", f"{text}\n", "| setting | values | default | |"]
    lines.append("|---|---|---|---|")
    for key, field in model.model_fields.items():
        own = f'<a id="{path}.{key}"></a>`{path}.{key}`' if level == 2 else f"`{key}`"
        description = " ".join((field.description or "").split()).replace("|", "\\|")
        values, default = kind(field).replace("|", "\\|"), _default(field).replace("|", "\\|")
        lines.append(f"| {own} | {values} | {default} | {description} |")
    return "\n".join(lines) + "\n"


def kind(field: FieldInfo) -> str:
    """What a setting takes, such as `integer > 0` or a list of names."""
    if "enum" in (extra := _enum(field)):
        return ", ".join(f"`{name}`" for name in extra["enum"])
    text = _kind(field.annotation)
    bounds = [
        sign.format(f"{value:g}")
        for constraint in field.metadata
        for name, sign in _BOUNDS.items()
        if isinstance(value := getattr(constraint, name, None), int | float)
    ]
    head, *rest = text.split(" or ")
    return " or ".join([" ".join([head, ", ".join(bounds)]).strip(), *rest])


def _enum(field: FieldInfo) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    if callable(field.json_schema_extra):
        field.json_schema_extra(schema)
    return schema


def _kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return ", ".join(f"`{shown(part)}`" for part in parts)
    if origin in (Union, types.UnionType):
        some = [_kind(part) for part in parts if part is not type(None)]
        return " or ".join([*some, *(["`null`"] if type(None) in parts else [])])
    if origin in (list, tuple):
        inner = dict.fromkeys(part for part in parts if part is not Ellipsis)
        return f"list of {' and '.join(_plural(_kind(part)) for part in inner)}"
    if _is_model(annotation):
        return "keys"
    return "path" if annotation is Path else _NAMES.get(annotation, "text")


def _plural(kind: str) -> str:
    return kind if "`" in kind else {"text": "names", "keys": "entries"}.get(kind, f"{kind}s")


def _leaves(annotation: Any) -> list[Any]:
    parts = get_args(annotation)
    return [leaf for part in parts for leaf in _leaves(part)] if parts else [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)  # type: ignore[call-arg]
    return "" if value is PydanticUndefined else f"`{shown(value)}`"


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(shown(inner) for inner in value) + "]"
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else repr(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
