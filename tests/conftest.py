"""What is settled before any test module is imported.

Without a GPU, Triton's kernels run in its interpreter: it decides that when it is imported, which
importing Megatron-core does. And pytest's workers beside each other (`pytest -n`) have one thread
each: two that share a core wait for each other at every product.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from keel_megatron import compat

compat.install()  # before Megatron-core is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)

# On a busy machine Hypothesis would call a test slow, and fail it.
hypothesis.settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any machine")

LONG = ("integration", "training", "checkpoint")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders with long files first: at the end no worker waits long for another's last file."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)
