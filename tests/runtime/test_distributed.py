"""Process groups on CUDA, with stand-ins for what needs a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from keel_megatron.runtime import distributed
from keel_megatron.runtime.device import Launch
from tests.settings import small_config


class StopError(Exception):
    """Ends what is tested where CUDA would begin."""


def test_cuda_has_no_groups_that_nothing_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gloo group is a mesh of connections between all replicas, on the host's network."""
    given: dict[str, Any] = {}

    def initialize(**settings: Any) -> None:
        given.update(settings)
        raise StopError

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", initialize)
    device = torch.device("cuda", 0)
    with pytest.raises(StopError):
        distributed.model_parallel(small_config().parallel, Launch(0, 1, 0, 1), device, 1)
    assert given["create_gloo_process_groups"] is False
