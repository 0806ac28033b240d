"""What CUDA reads once is set before anything asks for a device."""

from __future__ import annotations

import os
from typing import Any

import pytest

from keel_megatron.runtime import cuda_environment, distributed
from keel_megatron.runtime.device import Launch
from tests.settings import small_config

NAMES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
)
SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
ONE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


class AskedError(Exception):
    """Somebody asks for a device, which starts CUDA."""


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({}, {}, SEGMENTS),
        ({"training__device": "cpu"}, {}, {}),
        ({"parallel__tensor": 2}, {}, SEGMENTS | ONE),
        ({"training__deterministic": True}, {}, SEGMENTS | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
        # What the user has set stays.
        ({}, {"PYTORCH_ALLOC_CONF": "x:1"}, {"PYTORCH_ALLOC_CONF": "x:1"}),
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "x:1"}),
        (
            {"parallel__tensor": 2},
            {"CUDA_DEVICE_MAX_CONNECTIONS": "8"},
            SEGMENTS | {"CUDA_DEVICE_MAX_CONNECTIONS": "8"},
        ),
    ],
)
def test_it_is_set_before_cuda_starts(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    before: dict[str, str],
    after: dict[str, str],
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    seen: dict[str, str] = {}

    def choose(*_: Any) -> None:
        seen.update({name: os.environ[name] for name in NAMES if name in os.environ})
        raise AskedError

    monkeypatch.setattr(distributed, "choose_device", choose)
    config = small_config(**{"training__device": "auto", **settings})
    with (
        pytest.raises(AskedError),
        distributed.start(config.parallel, config.training, Launch(0, 1, 0, 1)),
    ):
        pass
    assert seen == after


def test_torch_knows_these_names() -> None:
    """It reads the allocator's settings without a word about an old name."""
    from pathlib import Path

    import torch

    header = Path(torch.__file__).parent / "include/c10/cuda/CUDAAllocatorConfig.h"
    assert f'"{cuda_environment.ALLOCATOR}"' in header.read_text()
