"""The device of a process, and how its kernels compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from keel_megatron.errors import UserError
from keel_megatron.runtime.device import choose_device, set_cuda_numerics


def test_a_process_that_is_shown_one_device_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's --gpus-per-task=1: every process of a node sees its own device as number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert choose_device("auto", 3) == torch.device("cuda", 0)
    # On a machine with one GPU, two processes are a mistake.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="start at most 1 process"):
        choose_device("auto", 1)


@pytest.fixture
def kept() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    reduced, fill = (
        matmul.allow_bf16_reduced_precision_reduction,
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    yield
    matmul.allow_bf16_reduced_precision_reduction = reduced
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("deterministic", [True, False])
def test_how_cuda_computes(deterministic: bool) -> None:
    set_cuda_numerics(deterministic=deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
