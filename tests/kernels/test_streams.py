"""Several residual streams: the explicit backward pass against torch's, and what a stage sends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keel_megatron.kernels.streams import read, reference_write, streams_of, write


def operands(n: int, branch_type: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Streams [3, n 2, 8], a branch [3, 2, 8] and a mix, fp64 but for the branch."""
    generator = torch.Generator().manual_seed(n)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parts = drawn(3, 2 * n, 8), drawn(3, 2, 8).to(branch_type), drawn(n * (n + 2))
    x, branch, mix = (part.requires_grad_() for part in parts)
    return x, branch, mix


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("branch_type", [torch.float64, torch.bfloat16])
def test_what_is_written_and_its_gradients_are_the_definitions(
    n: int, branch_type: torch.dtype
) -> None:
    x, branch, mix = operands(n, branch_type)
    found, expected = write(x, branch, mix), reference_write(x, branch, mix)
    torch.testing.assert_close(found, expected)
    down = torch.randn(found.shape, generator=torch.Generator().manual_seed(9)).double()
    ours = torch.autograd.grad(found, (x, branch, mix), down)
    theirs = torch.autograd.grad(expected, (x, branch, mix), down)
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        torch.testing.assert_close(own, other)


def test_a_mix_is_read_stream_by_stream() -> None:
    x, branch, mix = operands(3, torch.float64)
    assert streams_of(mix) == 3
    streams = x.view(3, 3, 2, 8).unbind(1)
    torch.testing.assert_close(
        read(x, mix), sum(a * stream for a, stream in zip(mix[:3], streams, strict=True))
    )
    across = mix[6:].view(3, 3)
    for k, written in enumerate(write(x, branch, mix).view(3, 3, 2, 8).unbind(1)):
        mixed = sum(across[j, k] * stream for j, stream in enumerate(streams))
        torch.testing.assert_close(written, mixed + mix[3 + k] * branch)


def test_what_is_written_can_be_sent_and_freed() -> None:
    """A pipeline frees a stage's output, which therefore is no view."""
    assert write(*operands(2, torch.float64))._base is None
