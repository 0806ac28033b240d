"""What a source file says of itself: a module's text, and the fields of its classes.

The files are read and not imported: importing Megatron-core would take seconds.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "keel_megatron"
_OF_THE_CODE = re.compile(r"\s*\b(?:No torch here|Imports no torch|Does not import torch)[^.]*\.")


@cache
def _tree(module: str) -> ast.Module:
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def constant(module: str, name: str) -> Any:
    """The value of a module's constant, a literal.

    Args:
        module: dotted name within the package.
        name: of the constant.
    """
    for node in _tree(module).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            found = [each.id if isinstance(each, ast.Name) else "" for each in names]
            if name in found:
                value = ast.literal_eval(node.value)  # type: ignore[attr-defined]
                return value[found.index(name)] if isinstance(target, ast.Tuple) else value
    raise KeyError(f"{module}: no {name}")


def text(module: str, *, skip_first: bool = False) -> str:
    """A module's docstring as Markdown, with the values of the constants that it names.

    Args:
        module: dotted name within the package.
        skip_first: leave its first paragraph out, where a heading says it.
    """
    said = ast.get_docstring(_tree(module)) or ""
    said = _OF_THE_CODE.sub("", said.partition("\n\n")[2] if skip_first else said)
    return re.sub(r"\b[A-Z]+_SECONDS\b", lambda m: f"{constant(module, m[0]):g} s", said)


def _class(module: str, name: str) -> ast.ClassDef:
    return next(
        node
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.ClassDef) and node.name == name
    )


def fields(module: str, name: str) -> list[tuple[str, str, str]]:
    """Name, type and docstring of a class's annotated attributes, in order."""
    found: list[tuple[str, str, str]] = []
    body = _class(module, name).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        said = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            said = " ".join(str(after.value.value).split())
        found.append((node.target.id, ast.unparse(node.annotation), said.replace("None", "null")))
    return found


def method(module: str, name: str, of: str) -> str:
    """The docstring of a class's method."""
    methods = (node for node in _class(module, of).body if isinstance(node, ast.FunctionDef))
    return next(ast.get_docstring(node) or "" for node in methods if node.name == name)


def field_table(module: str, name: str) -> str:
    """A table of a class's attributes as they are in JSON."""
    lines = ["| field | type | |", "|---|---|---|"]
    for field, kind, said in fields(module, name):
        lines.append(f"| `{field}` | {_plain(kind)} | {cell(said)} |")
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(cell(str(value)) for value in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(said: str) -> str:
    """Text in a table's cell."""
    return " ".join(said.split()).replace("|", "\\|")


_JSON = {"int": "integer", "float": "number", "str": "text", "bool": "true, false", "None": "null"}


def _plain(kind: str) -> str:
    """A type in the words of JSON."""
    return " or ".join(_JSON.get(part) or _other(part) for part in kind.split(" | "))


def _other(kind: str) -> str:
    choices = ", ".join(f"`{one}`" for one in re.findall(r"'([^']+)'", kind))
    if kind.startswith("Literal["):
        return choices or f"`{kind[8:-1]}`"
    if kind.startswith(("tuple[", "list[")):
        return "list"
    return f"object with {choices}" if choices else "object"
