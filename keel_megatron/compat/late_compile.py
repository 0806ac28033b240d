"""Import Megatron-core without torch's compiler.

On import Megatron-core hands some fifty small functions to `torch.compile`, which imports Dynamo
and Inductor for it: a thousand modules, 1.2 s of a core in every process. Hardly any is ever
called: none on a CPU, SwiGLU's on CUDA. Here each is compiled at its first call instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_MODULE = "megatron.core.jit"
"""Where Megatron-core's modules take their decorator `jit_fuser` from."""


def install() -> None:
    """Let `megatron.core.jit` be imported like this from now on. It costs nothing by itself."""
    sys.meta_path.insert(0, _Finder())


def compile_late(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)`, compiled when it is called for the first time."""
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if compiled is None:
            import torch

            from keel_megatron.compat import compile_cache

            compile_cache.use()
            compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return call


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module where it always was, with another loader."""
        if fullname != _MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """The module as it is, with `compile_late` for its decorator."""
        super().exec_module(module)
        module.jit_fuser = compile_late  # type: ignore[attr-defined]
