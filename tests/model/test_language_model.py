"""The settings that Megatron-core is given."""

from __future__ import annotations

import pytest
import torch

from keel_megatron.layout.devices import device_named
from keel_megatron.layout.stages import partition
from keel_megatron.model.language_model import transformer_config
from tests.settings import small_config


@pytest.mark.parametrize("virtual", [1, 2])
def test_the_host_does_not_wait_after_a_message(virtual: int) -> None:
    """Megatron-core would wait for the whole device after every batch of messages."""
    config = small_config(parallel__pipeline=2, parallel__virtual_pipeline=virtual)
    layout = partition(config, 1, device_named("h100")).layout
    found = transformer_config(config, layout, 0, torch.float32, torch.device("cuda"))
    assert not found.batch_p2p_sync
    assert found.batch_p2p_comm == (virtual == 1)


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False)])
def test_a_deterministic_run_sums_the_embeddings_gradient_in_order(
    device: str, expected: bool
) -> None:
    config = small_config(training__deterministic=True)
    layout = partition(config, 1, device_named("h100")).layout
    found = transformer_config(config, layout, 0, torch.float32, torch.device(device))
    assert found.deterministic_mode == expected
