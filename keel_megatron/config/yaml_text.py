"""YAML as people write it: `1e-3` is a number, a key stands once, and what is dumped reads back."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1 in which a key stands once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written, before merge keys (`<<`) bring in the keys of others."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name!r} stands twice, on lines {seen[name]} and {line}",
                    problem_mark=key.start_mark,
                )
            seen[name] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Writes text so that `_Loader` reads the same."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Outside double quotes PyYAML writes these breaks as they are, and reads them back as others.
    style = '"' if any(line_break in text for line_break in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


# YAML 1.1 wants a dot in a number with an exponent: 1.0e-3. People write 1e-3. The dumper knows it
# too: a run named "1e3" would otherwise be saved without quotes and read back as a number.
_FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        ValueError: it is not valid YAML; the message says why and where, in one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("is not valid YAML: it is nested too deeply") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"the character #x{ord(text[error.position]):04x} is not allowed (line {line})"
        raise ValueError(f"is not valid YAML: {where}") from error
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"is not valid YAML: {said}{where}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2024-13-01 is a ValueError
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from error


def write_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads back as an equal value; mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def shown(value: Any) -> str:
    """A value in one short line, as it stands in YAML; text always in quotes."""
    if isinstance(value, str):
        text = repr(value)
    else:
        try:
            text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6)
            text = text.removesuffix("...\n").strip()
        except yaml.YAMLError:
            text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
