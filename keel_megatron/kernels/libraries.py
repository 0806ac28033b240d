"""NVIDIA's optional libraries: which of their extensions can be imported.

Package names are not enough: `apex` on PyPI is a web toolkit, and `transformer-engine` alone is an
empty package. These functions test the extensions that Megatron-core 0.16.1 uses.
"""

from __future__ import annotations

import importlib
from functools import cache


def has_transformer_engine() -> bool:
    """Transformer Engine's torch modules: linears, attention, fused Adam, fp8."""
    return _imports("transformer_engine.pytorch")


def has_apex_adam() -> bool:
    """Apex's fused Adam, built with `APEX_CPP_EXT=1 APEX_CUDA_EXT=1`."""
    return _imports("amp_C") and _imports("apex.optimizers")


def has_gradient_fusion() -> bool:
    """Apex's kernel that adds a weight's gradient to the accumulated one within its product."""
    return _imports("fused_weight_gradient_mlp_cuda")


@cache
def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError):  # OSError: a shared library is missing
        return False
    return True
