"""What the ranks of a test, and its commands, import: once for all of them.

tests/distributed.py and tests/warm.py fork them from the process that has done it.
"""

from __future__ import annotations

import gc
import importlib
import warnings

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch._dynamo  # noqa: F401  (torch's optimizers ask for it)

import tests.conftest  # noqa: F401  (before Triton and Megatron-core)

import keel_megatron.cli.main  # isort: skip
import keel_megatron.inference.generate  # isort: skip
import keel_megatron.planner.trace.rank  # isort: skip
import keel_megatron.training.run  # noqa: F401  # isort: skip
from keel_megatron.compat import cpu

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in cpu.MODULES:
        importlib.import_module(f"megatron.core.{name}")

# Megatron-core collects garbage at every save and load: not in all of these modules, in every fork.
gc.collect()
gc.freeze()
