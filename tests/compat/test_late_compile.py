"""Megatron-core comes without torch's compiler, and still compiles what is called."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from keel_megatron.compat import compile_cache
from keel_megatron.compat.late_compile import compile_late


def test_the_trainer_is_imported_without_the_compiler() -> None:
    """In a process of its own: here somebody else may have imported it."""
    probe = """
import sys
from keel_megatron import compat
compat.install(); compat.install()
import keel_megatron.training.run
from megatron.core.fusions import fused_bias_swiglu
assert fused_bias_swiglu.swiglu.__wrapped__.__name__ == "swiglu"
from megatron.core.transformer.moe import router
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", probe], check=True)


def test_a_function_is_compiled_once_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compiler(function):
        compiled.append(function)
        return lambda *args, **kwargs: ("compiled", function(*args, **kwargs))

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(compile_cache, "use", lambda: compiled.append("the private cache"))

    def divide(a: int, b: int = 1) -> float:
        """Words."""
        return a / b

    late = compile_late(divide)
    assert (late.__name__, late.__doc__, compiled) == ("divide", "Words.", [])
    assert late(6, b=3) == ("compiled", 2.0)
    assert late(6) == ("compiled", 6.0)
    assert compiled == ["the private cache", divide]
    assert compile_late(dynamic=True)(divide).__name__ == "divide"


def test_importing_the_package_installs_nothing() -> None:
    """Neither an import hook nor a warnings filter, until `compat.install` is called."""
    probe = """
import importlib, pkgutil, sys, warnings
import torch, megatron.core  # what these install themselves
finders, filters = list(sys.meta_path), list(warnings.filters)
import keel_megatron
for module in pkgutil.walk_packages(keel_megatron.__path__, "keel_megatron."):
    if module.name.split(".")[1] in ("compat", "config", "runtime", "training", "cli"):
        importlib.import_module(module.name)
assert finders == [finder for finder in sys.meta_path if finder in finders]
added = [finder for finder in sys.meta_path if finder not in finders]
assert not [finder for finder in added if "keel" in type(finder).__module__], added
ours = [one for one in warnings.filters if one not in filters and "megatron" in str(one)]
assert ours == [], ours
from keel_megatron import compat
compat.install()
assert "keel" in type(sys.meta_path[0]).__module__
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", probe], check=True)
