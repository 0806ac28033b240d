"""The Triton kernels compile for GPUs that are not here, within bounds on registers and spills.

In a process of its own: this one has Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from keel_megatron.kernels.selection import triton_is_installed

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "triton_table.py"


def check(folder: Path, *more: str) -> list[str]:
    """The rows of the kernels that were compiled, into an empty cache; fails above a bound."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "--check", *more],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(not triton_is_installed(), reason="needs Triton")
def test_every_kernel_compiles_within_its_bounds(tmp_path: Path) -> None:
    rows = check(tmp_path)
    assert len(rows) == 11
    assert all(row.count("|") == 10 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(not triton_is_installed(), reason="needs Triton")
def test_every_shape_compiles_within_its_bounds(tmp_path: Path) -> None:
    assert len(check(tmp_path, "--all")) > 30


@pytest.mark.skipif(not triton_is_installed(), reason="needs Triton")
def test_every_module_of_kernels_is_compiled() -> None:
    """And every kernel in the tool's list is launched by a case of the quick test."""
    from tools import triton_table

    listed = [(module.__name__, name) for module, names in triton_table.KERNELS for name in names]
    modules = {path.stem for path in (ROOT / "keel_megatron" / "kernels").glob("triton_*.py")}
    assert {name.rpartition(".")[2] for name, _kernel in listed} == modules
    quick = [case for case in triton_table.CASES if case.quick]
    found = [launch.kernel for case in quick for launch in triton_table.launches(case.run)]
    kernels = [getattr(module, name) for module, names in triton_table.KERNELS for name in names]
    assert {id(kernel) for kernel in found} == {id(kernel) for kernel in kernels}
