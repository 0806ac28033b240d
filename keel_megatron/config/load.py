"""Configuration of a run, from YAML and dotted overrides; all errors are reported together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from keel_megatron.config.bundled import bundled_names, locate
from keel_megatron.config.checks import known_problems, problems
from keel_megatron.config.error_messages import section_suggestion, translate
from keel_megatron.config.nearby import nearby
from keel_megatron.config.reading import read_small_text
from keel_megatron.config.renamed import current_key, rename
from keel_megatron.config.run import RunConfig
from keel_megatron.config.yaml_text import read_inline, read_yaml, shown, write_yaml
from keel_megatron.errors import ConfigError, Problem


def load_config(
    source: Path | str | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    world_size: int | None = None,
) -> RunConfig:
    """Read, or build, a configuration.

    Args:
        source: a YAML file; the name of a bundled configuration (`bundled_names`); its content as a
            mapping, {"model": {"blocks": 8, ...}, ...}; or a configuration to change.
        overrides: settings that replace those of the source: `section.key=value` each, the value in
            YAML, null written out; or a mapping {"section.key": value}. The last one wins.
        world_size: number of processes, to check the layout against; None skips this check.

    Raises:
        ConfigError: the configuration has errors; it lists all of them.
    """
    name, sections = _sections(source)
    mapping, wrong = rename(sections)
    if isinstance(overrides, Mapping):
        found = [_assign(mapping, path, value) for path, value in overrides.items()]
    else:
        found = [_apply(mapping, override) for override in overrides]
    wrong += [problem for problem in found if problem is not None]
    return _parse(mapping, name, world_size, wrong)


def parse_config(
    mapping: Mapping[str, Any], source: str, world_size: int | None = None
) -> RunConfig:
    """A configuration from a mapping of sections; `source` names it in errors.

    Raises:
        ConfigError: the configuration has errors; it lists all of them.
    """
    renamed, wrong = rename(mapping)
    return _parse(renamed, source, world_size, wrong)


def require_valid(config: RunConfig, source: str, world_size: int) -> None:
    """Check a configuration against a number of processes.

    Args:
        config: a configuration whose single values are valid.
        source: its name in errors.
        world_size: the number of processes.

    Raises:
        ConfigError: it does not fit; it lists all errors.
    """
    wrong = [Problem(path, message) for path, message in problems(config, world_size)]
    if wrong:
        raise ConfigError(source, wrong)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; reading it gives an equal configuration."""
    return write_yaml(config.model_dump(mode="json"))


def flatten(config: RunConfig) -> dict[str, Any]:
    """The configuration as {"section.key": value}, the values as in JSON."""
    sections = config.model_dump(mode="json")
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
    }


def _read(path: Path) -> dict[str, Any]:
    """The file's mapping of sections."""
    source = str(path)
    try:
        content = read_yaml(read_small_text(locate(path)))
    except OSError as error:
        near = nearby(path, "*.y*ml", [] if path.suffix else bundled_names())
        if not near and not path.suffix:
            near = "; `keel config list` shows the bundled configurations"
        problem = Problem("file", f"cannot be read: {error.strerror}{near}")
        raise ConfigError(source, [problem]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(source, [Problem("file", "is not UTF-8 text")]) from error
    except ValueError as error:
        raise ConfigError(source, [Problem("file", str(error))]) from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"not a mapping: {shown(content)}"
        wanted = ", ".join(RunConfig.model_fields)
        raise ConfigError(source, [Problem("file", f"is {found}; expected sections: {wanted}")])
    return {
        name: dict(section) if isinstance(section, dict) else section
        for name, section in content.items()
    }


def _sections(source: Path | str | Mapping[str, Any] | RunConfig) -> tuple[str, dict[str, Any]]:
    """The source's name in errors, and its sections as a new mapping."""
    if isinstance(source, RunConfig):
        # Without what was not set: a default may depend on a setting that changes.
        return "configuration", source.model_dump(mode="json", exclude_unset=True)
    if not isinstance(source, Mapping):
        return str(source), _read(Path(source))
    return "configuration", {
        name: dict(section) if isinstance(section, Mapping) else section
        for name, section in source.items()
    }


def _apply(mapping: dict[str, Any], override: str) -> Problem | None:
    """Apply one override in place; the problem with it, if there is one."""
    path, equals, text = override.partition("=")
    place = _place(path) if equals else None
    if place is None:
        near = section_suggestion(path) if equals and path and "." not in path else ""
        near = near if "." in near else ""
        return Problem(override, f"an override must be section.key=value{near}")
    try:
        _set(mapping, place, read_inline(text))
    except ValueError as error:
        return Problem(path, f"{shown(text)} {error}")
    return None


def _assign(mapping: dict[str, Any], path: str, value: Any) -> Problem | None:
    """The same for a setting of a mapping of overrides."""
    place = _place(path)
    if place is None:
        near = section_suggestion(path) if "." not in path else ""
        return Problem(path, f"a setting must be section.key{near if '.' in near else ''}")
    _set(mapping, place, value)
    return None


def _place(path: str) -> tuple[str, str] | None:
    """Section and key of a dotted path; None: it is none."""
    section, _dot, key = path.partition(".")
    return (section, key) if section and key and "." not in key else None


def _set(mapping: dict[str, Any], place: tuple[str, str], value: Any) -> None:
    """Set a setting in place."""
    section, key = place
    if mapping.get(section) is None:
        mapping[section] = {}
    # A section that is not a mapping is left for validation to report.
    if isinstance(mapping[section], dict):
        mapping[section][current_key(section, key)] = value


def _parse(
    mapping: dict[str, Any], source: str, world_size: int | None, wrong: list[Problem]
) -> RunConfig:
    # A missing or empty section has its defaults; its required settings are reported as missing.
    mapping = {name: {} if section is None else section for name, section in mapping.items()}
    mapping = {**mapping, **{name: {} for name in RunConfig.model_fields if name not in mapping}}
    try:
        config = RunConfig.model_validate(mapping)
    except ValidationError as error:
        wrong = wrong + translate(error.errors())
        crossed = known_problems(_valid_part(mapping, error.errors()), world_size)
        wrong += [Problem(path, message) for path, message in crossed]
        raise ConfigError(source, wrong) from None
    wrong = wrong + [Problem(path, message) for path, message in problems(config, world_size)]
    if wrong:
        raise ConfigError(source, wrong)
    return config


def _valid_part(mapping: dict[str, Any], errors: Sequence[ErrorDetails]) -> RunConfig:
    """The configuration without its invalid settings: reading one raises AttributeError."""
    bad = {tuple(error["loc"][:2]) for error in errors}
    sections: dict[str, BaseModel] = {}
    for name, field in RunConfig.model_fields.items():
        kind, values = field.annotation, mapping[name]
        if not isinstance(values, dict) or not isinstance(kind, type):
            continue
        section = kind.model_construct(
            **{key: values[key] for key in values.keys() & kind.model_fields}
        )
        for key in kind.model_fields:
            if (name, key) in bad:
                section.__dict__.pop(key, None)
        sections[name] = section
    config = RunConfig.model_construct(None, **sections)
    for name in RunConfig.model_fields.keys() - sections.keys():
        config.__dict__.pop(name, None)  # a section that is not a mapping has no default
    return config
