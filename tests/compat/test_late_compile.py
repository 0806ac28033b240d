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
import keel_megatron.training.run
from megatron.core.fusions import fused_bias_swiglu
assert fused_bias_swiglu.swiglu.__wrapped__.__name__ == "swiglu"
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
