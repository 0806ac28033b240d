"""Write conversations about Python's standard library, made of its docstrings.

A small set for docs/fine-tuning.md: every public function of some modules is asked about.
`python tools/docstring_chat.py FILE`.
"""

from __future__ import annotations

import argparse
import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    *("argparse", "ast", "bisect", "calendar", "contextlib", "copy", "csv", "dataclasses"),
    *("difflib", "fnmatch", "fractions", "functools", "glob", "gzip", "heapq", "inspect"),
    *("locale", "mimetypes", "operator", "pathlib", "platform", "pprint", "random", "shlex"),
    *("shutil", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile"),
    *("textwrap", "threading", "tokenize", "traceback", "typing", "uuid", "warnings"),
)


def functions(module: str) -> Iterator[tuple[str, str, list[str]]]:
    """Name, first sentence of the docstring and arguments of a module's public functions."""
    path = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if 20 <= len(text) <= 120:
            arguments = [one.arg for one in node.args.args if one.arg not in ("self", "cls")]
            yield f"{module}.{node.name}", text, arguments


def conversation(name: str, text: str, arguments: list[str]) -> list[dict[str, str]]:
    """What a function does, then what it takes."""
    turns = [(f"What does {name} do?", text)]
    if arguments:
        turns.append(("Which arguments does it take?", ", ".join(arguments)))
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [conversation(*one) for module in MODULES for one in functions(module)]
    with path.open("w", encoding="utf-8") as file:
        for messages in found:
            file.write(json.dumps({"messages": messages}) + "\n")
    print(f"{len(found)} conversations in {path}")


if __name__ == "__main__":
    main()
