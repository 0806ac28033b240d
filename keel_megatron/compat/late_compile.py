"""Import Megatron-core without torch's compiler.

On import Megatron-core hands some fifty small functions to `torch.compile`, most of them through
`megatron.core.jit.jit_fuser` and since 0.17 one in `transformer.moe.router` by itself. That imports
Dynamo and Inductor: a thousand modules, 1.2 s of a core in every process. Hardly any function is
ever called. Here each is compiled at its first call instead.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from keel_megatron.compat.patch_table import patch

_MODULES = ("megatron.core.jit", "megatron.core.transformer.moe.router")
"""Those that take `torch.compile` on import, for themselves or for others."""


@patch(
    changes="`torch.compile`, while `megatron.core.jit` and `transformer.moe.router` are imported",
    why="they compile functions on import that are hardly ever called: 1.2 s in every process",
    needed_by="megatron-core 0.16.1 to 0.19.2",
    test="tests/compat/test_late_compile.py::test_the_trainer_is_imported_without_the_compiler",
)
def install() -> None:
    """Let Megatron-core be imported like this from now on. It costs nothing by itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def compile_late(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`torch.compile(function, **options)`, compiled when it is called for the first time."""
    if function is None:
        return functools.partial(compile_late, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        """Call the compiled function, and compile it before the first call."""
        nonlocal compiled
        if compiled is None:
            import torch

            from keel_megatron.compat import compile_cache

            compile_cache.use()
            compiled = torch.compile(function, **options)
        return compiled(*args, **kwargs)

    return call


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module where it always was, with another loader."""
        if fullname not in _MODULES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with `compile_late` in torch.compile's place."""
        import torch

        compiler: Any = torch.compile
        torch.compile = compile_late  # type: ignore[assignment]
        try:
            super().exec_module(module)
        finally:
            torch.compile = compiler
