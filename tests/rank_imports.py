"""What the ranks of a test import, once for all of them (tests/distributed.py)."""

from __future__ import annotations

import importlib
import warnings

import torch._dynamo  # noqa: F401  (torch's optimizers ask for it)

import tests.conftest  # noqa: F401  (before Triton and Megatron-core)

import keel_megatron.training.run  # noqa: F401  # isort: skip
from keel_megatron.compat import cpu

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in cpu.MODULES:
        importlib.import_module(f"megatron.core.{name}")
