"""YAML without duplicate keys and with the scalars of YAML 1.2; dumps read back equal.

Numbers are decimal (`100`, `1_000`, `1e-3`), booleans are `true` and `false`, null is `null`, `~`
or empty. `0100`, `0x1f`, `1:30`, `yes`, `off` and `2024-01-31` are text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

_DEEPEST = 32
_MOST_VALUES = 100_000


def check_structure(text: str, loader: Any) -> None:
    """Check that parsing a text with a PyYAML loader takes time proportional to its length.

    With aliases and merge keys, a few lines can expand to billions of values, and a list as a key
    is hashed value by value. This function does not recurse, so deep nesting cannot crash it.

    Raises:
        yaml.YAMLError: the text is not YAML, is nested too deeply, expands to too many values, or
            has a key that is not a scalar.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[_OpenNode] = []
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            node = _OpenNode(event.anchor, isinstance(event, yaml.MappingStartEvent))
            _check_key(open_nodes, event)
            open_nodes.append(node)
            if len(open_nodes) > _DEEPEST:
                _refuse(event, f"it is nested more than {_DEEPEST} levels deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            node = open_nodes.pop()
            size, anchor = node.values, node.anchor
        elif isinstance(event, yaml.AliasEvent):
            _check_key(open_nodes, event)
            if event.anchor not in sizes:
                _refuse(event, f"the alias *{event.anchor} has no anchor before it")
            size, anchor = sizes[event.anchor], None
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor = 1, event.anchor
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if open_nodes:
            open_nodes[-1].children += 1
            open_nodes[-1].values += size
            if open_nodes[-1].values > _MOST_VALUES:
                _refuse(event, f"it expands to more than {_MOST_VALUES:,} values")


@dataclass
class _OpenNode:
    """A list or mapping whose end has not been read."""

    anchor: str | None
    is_mapping: bool
    children: int = 0
    values: int = 1
    """Number of values in it, with aliases expanded."""


def _check_key(open_nodes: list[_OpenNode], event: yaml.Event) -> None:
    """Refuse a key that is not a scalar."""
    if open_nodes and open_nodes[-1].is_mapping and open_nodes[-1].children % 2 == 0:
        _refuse(event, "a key is not a scalar")


def _refuse(event: Any, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping and check its own keys, before merge keys (`<<`) add others."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name!r} is duplicated, on lines {seen[name]} and {line}",
                    problem_mark=key.start_mark,
                )
            seen[name] = line
        return node


class _Dumper(yaml.SafeDumper):
    """A dumper whose text `_Loader` reads back equal."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Outside double quotes, PyYAML does not escape these breaks and reads them back differently.
    style = '"' if any(line_break in text for line_break in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


_DECIMAL = r"(0|[1-9][0-9]*(_[0-9]+)*)"
_SCALARS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": rf"[-+]?{_DECIMAL}",
    "float": rf"[-+]?({_DECIMAL}\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"
    rf"|[-+]?{_DECIMAL}[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "null": r"~|null|Null|NULL|",
    "merge": r"<<",
}
_Loader.yaml_implicit_resolvers = {}
for _kind, _pattern in _SCALARS.items():
    # The dumper keeps YAML 1.1's resolvers too: it quotes text that either version converts.
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(rf"({_pattern})\Z"), [None]
        )


def read_yaml(text: str) -> Any:
    """Parse YAML text.

    Raises:
        ValueError: the text is not valid YAML; the message says why and where, in one line.
    """
    try:
        check_structure(text, _Loader)
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"the character #x{ord(text[error.position]):04x} is not allowed (line {line})"
        raise ValueError(f"is not valid YAML: {where}") from error
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"is not valid YAML: {said}{where}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from error


def read_inline(text: str) -> Any:
    """Parse the YAML value of an override.

    Raises:
        ValueError: the text is empty, is not valid YAML, or has a part that YAML would drop: a
            comment, white space around text, line breaks, an anchor. The message says how to write
            it.
    """
    if not text.strip():
        raise ValueError("is empty; write null for none, '\"\"' for empty text")
    if text.strip() == "~":
        raise ValueError("is null in YAML, not a folder; write null, or a full path")
    value = read_yaml(text)
    kept = text == value if isinstance(value, str) and _is_plain(text) else _is_whole(text)
    if not kept:
        meant = json.dumps(text, ensure_ascii=False)
        raise ValueError(f"would be parsed as {shown(value)}; to keep it as text, write '{meant}'")
    return value


def _is_plain(text: str) -> bool:
    """Whether the text is one unquoted scalar."""
    node = yaml.compose(text, Loader=_Loader)
    return isinstance(node, yaml.ScalarNode) and node.style is None


def _is_whole(text: str) -> bool:
    """Whether a text has no comments, anchors, tags or document markers."""
    end = 0
    for token in yaml.scan(text, Loader=_Loader):
        if "#" in text[end : token.start_mark.index] or isinstance(token, _MARKS):
            return False
        end = token.end_mark.index
    return True


_MARKS = (
    yaml.AnchorToken,
    yaml.AliasToken,
    yaml.TagToken,
    yaml.DirectiveToken,
    yaml.DocumentStartToken,
    yaml.DocumentEndToken,
)


def write_yaml(value: Any) -> str:
    """Dump a value as YAML that `read_yaml` reads back equal; mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def shown(value: Any) -> str:
    """A value as YAML in one short line; text is always quoted."""
    if isinstance(value, str):
        text = repr(value)
    else:
        try:
            text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6)
            text = text.removesuffix("...\n").strip()
        except yaml.YAMLError:
            text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
