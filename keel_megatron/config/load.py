"""A run's configuration from YAML and dotted overrides, with every problem reported at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

import yaml
from keel_megatron.config.errors import ConfigError, Problem
from keel_megatron.config.run import RunConfig, problems


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people write it: `1e-3` is a number, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name!r} stands twice, on lines {seen[name]} and {line}",
                    problem_mark=key.start_mark,
                )
            seen[name] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(
    path: Path | str, overrides: Sequence[str] = (), world_size: int | None = None
) -> RunConfig:
    """Read a configuration.

    Args:
        path: the YAML file.
        overrides: `section.key=value` each, the value in YAML; a later one wins.
        world_size: processes of the run, to check the layout against; None leaves that out.

    Raises:
        ConfigError: with everything that is wrong.
    """
    source = str(path)
    mapping = _read(Path(path))
    wrong: list[Problem] = []
    for override in overrides:
        problem = _apply(mapping, override)
        if problem is not None:
            wrong.append(problem)
    return _parse(mapping, source, world_size, wrong)


def parse_config(
    mapping: Mapping[str, Any], source: str, world_size: int | None = None
) -> RunConfig:
    """A configuration from a mapping of sections; `source` names it in errors.

    Raises:
        ConfigError: with everything that is wrong.
    """
    return _parse(dict(mapping), source, world_size, [])


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; reading it gives an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    """The file's mapping of sections."""
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ConfigError(source, [Problem("file", f"cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(source, [Problem("file", "is not UTF-8 text")]) from error
    except yaml.YAMLError as error:
        raise ConfigError(source, [Problem("file", _yaml_problem(error))]) from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        wanted = ", ".join(RunConfig.model_fields)
        raise ConfigError(source, [Problem("file", f"is {found}; wanted are sections: {wanted}")])
    return {
        name: dict(section) if isinstance(section, dict) else section
        for name, section in content.items()
    }


def _yaml_problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"is not valid YAML: {problem}{where}"


def _apply(mapping: dict[str, Any], override: str) -> Problem | None:
    """Set one override in place; what is wrong with it, if anything."""
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not equals or not dot or not section or not key or "." in key:
        return Problem(override, "an override is written section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        return Problem(path, f"{text!r} {_yaml_problem(error)}")
    current = mapping.setdefault(section, {})
    if not isinstance(current, dict):
        current = mapping[section] = {}
    current[key] = value
    return None


def _parse(
    mapping: dict[str, Any], source: str, world_size: int | None, wrong: list[Problem]
) -> RunConfig:
    # A section that is named and left empty means its defaults.
    mapping = {name: {} if section is None else section for name, section in mapping.items()}
    try:
        config = RunConfig.model_validate(mapping)
    except ValidationError as error:
        # A setting that may be of several kinds fails once for each: the first says it all.
        translated: dict[str, Problem] = {}
        for problem in map(_translate, error.errors()):
            translated.setdefault(problem.path, problem)
        raise ConfigError(source, wrong + list(translated.values())) from None
    wrong = wrong + [Problem(path, message) for path, message in problems(config, world_size)]
    if wrong:
        raise ConfigError(source, wrong)
    return config


_KINDS = {
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "int_parsing": "is not a whole number",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is not true or false",
    "bool_parsing": "is not true or false",
    "string_type": "is not text (put it in quotes)",
    "path_type": "is not a path",
    "tuple_type": "is not a path or a list of paths",
    "too_short": "is empty; name at least one, or null for the default",
    "model_type": "is not a section of key: value lines",
    "model_attributes_type": "is not a section of key: value lines",
    "dict_type": "is not a section of key: value lines",
}
_BOUNDS = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}


def _translate(error: ErrorDetails) -> Problem:
    """One of pydantic's errors in the words of the user."""
    location = [str(part) for part in error["loc"]]
    path, value, kind = ".".join(location[:2]), error["input"], error["type"]
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(path, f"is unknown{_suggestion(location)}")
    if kind == "missing":
        return Problem(path, f"is missing: {_description(location)}")
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return Problem(path, f"{value!r} {words} {context[key]}")
    if kind == "literal_error":
        return Problem(path, f"{value!r} must be one of {_choices(location)}")
    if kind == "string_pattern_mismatch":
        return Problem(path, f"{value!r} may hold letters, digits, '.', '_' and '-' only")
    words = _KINDS.get(kind, error["msg"])
    quoted = isinstance(value, str) and re.fullmatch(r"[-+0-9.eE]+|true|false", value)
    return Problem(path, f"{value!r} {words}{' (remove the quotes)' if quoted else ''}")


def _section(name: str) -> type[BaseModel] | None:
    field = RunConfig.model_fields.get(name)
    annotation = field.annotation if field else None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _choices(location: list[str]) -> str:
    """The words that a setting takes, from its annotation."""
    section = _section(location[0])
    annotation = section.model_fields[location[1]].annotation if section else None
    return ", ".join(str(choice) for choice in _literals(annotation))


def _literals(annotation: Any) -> Iterator[Any]:
    for argument in get_args(annotation):
        if isinstance(argument, (str, int)):
            yield argument
        elif argument is float:
            yield "a number"
        else:
            yield from _literals(argument)


def _description(location: list[str]) -> str:
    if len(location) == 1:
        return f"section; {RunConfig.model_fields[location[0]].description}"
    section = _section(location[0])
    return str(section.model_fields[location[1]].description) if section else ""


def _suggestion(location: list[str]) -> str:
    """The nearest known name for an unknown one: in its section first, then in the others."""
    if len(location) == 1:
        near = difflib.get_close_matches(location[0], RunConfig.model_fields, n=1)
        return f"; did you mean the section {near[0]}?" if near else _known(RunConfig)
    name, key = location[0], location[1]
    own = _section(name)
    if own is None:
        return ""
    for other in RunConfig.model_fields:
        section = _section(other)
        if section is not None and key in section.model_fields:
            return f"; did you mean {other}.{key}?"
    near = difflib.get_close_matches(key, own.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {name}.{near[0]}?" if near else _known(own)


def _known(model: type[BaseModel]) -> str:
    return f"; known are {', '.join(model.model_fields)}"
