"""The table of patches is complete, its tests exist, and docs/compat.md shows it."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import grimp
import pytest

from keel_megatron.compat import patch_table
from tools import compat_table

ROOT = Path(__file__).resolve().parents[2]
PATCHES = patch_table.patches()
HELPERS = {"compile_cache.private_folder", "late_compile.compile_late"}
"""Public functions that patch nothing."""


def test_every_function_of_the_room_is_in_the_table() -> None:
    public = set()
    for module in {row.name.partition(".")[0] for row in PATCHES}:
        whole = sys.modules[f"keel_megatron.compat.{module}"]
        public |= {
            f"{module}.{name}"
            for name, function in inspect.getmembers(whole, inspect.isfunction)
            if not name.startswith("_") and function.__module__ == whole.__name__
        }
    assert {row.name for row in PATCHES} == public - HELPERS
    modules = {path.stem for path in (ROOT / "keel_megatron" / "compat").glob("*.py")}
    assert {row.name.partition(".")[0] for row in PATCHES} == modules - {"__init__", "patch_table"}


@pytest.mark.parametrize("row", PATCHES, ids=lambda row: row.name)
def test_its_test_exists(row: patch_table.Patch) -> None:
    path, _, name = row.test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", patch_table.PRIVATE_NAMES, ids=lambda row: row.name)
def test_a_private_name_is_used_where_it_is_said(row: patch_table.PrivateName) -> None:
    assert row.name in (ROOT / "keel_megatron" / row.file).read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    assert compat_table.page() == compat_table.PAGE.read_text(encoding="utf-8")


def test_what_starts_a_process_with_megatron_core_installs_the_patches_first() -> None:
    """Programs that import a module which, directly or not, imports Megatron-core."""
    graph = grimp.build_graph(
        "keel_megatron", include_external_packages=True, exclude_type_checking_imports=True
    )
    ours = {name for name in graph.modules if name.startswith("keel_megatron")}
    leads = graph.find_upstream_modules  # what a module imports, directly or not
    without = []
    for program in [*(ROOT / "tools").rglob("*.py"), ROOT / "keel_megatron" / "cli" / "main.py"]:
        text = program.read_text(encoding="utf-8")
        if "__main__" not in text and program.parent.name != "cli":
            continue
        found = [name for name in _imported(ast.parse(text)) if name in ours]
        if any("megatron" in leads(name) for name in found) and "compat.install()" not in text:
            without.append(program.relative_to(ROOT))
    assert without == []


def _imported(tree: ast.Module) -> set[str]:
    """Names of modules that the top level of a program imports."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
