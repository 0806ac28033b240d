"""Clipping by lists of tensors: the norm against fp64's, the scaling against megatron-core's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor

from keel_megatron.compat import clipping
from keel_megatron.compat.clipping import _norm, _scale


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in ((7, 5), (33,), (1,), (64, 3))]


def test_the_norm_of_a_list_is_that_of_its_elements() -> None:
    found, _ = _norm(0, torch.zeros(1), [gradients()], False)
    whole = torch.cat([tensor.flatten() for tensor in gradients()]).double().norm().item()
    assert found.shape == (1,)
    assert found.item() == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_list_is_scaled_to_the_last_bit_alike(in_place: bool) -> None:
    sources, theirs = gradients(), gradients()
    targets = sources if in_place else [torch.zeros_like(tensor) for tensor in sources]
    _scale(0, torch.zeros(1), [sources, targets], 0.3)
    local_multi_tensor_scale(0, None, [theirs, theirs], 0.3)
    for found, expected, source in zip(targets, theirs, sources, strict=True):
        assert torch.equal(found, expected)
        assert in_place or torch.equal(source * 0.3, expected)


def test_megatron_core_clips_with_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it would go through the tensors one by one; faster ones of Apex's stay."""
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", local_multi_tensor_scale)
    clipping.install()
    assert (clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl) == (_norm, _scale)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", "Apex's")
    clipping.install()
    assert clip_grads.l2_norm_impl == "Apex's"


def test_gradients_are_read_by_any_version() -> None:
    gradient = torch.ones(3)
    earlier = SimpleNamespace(get_main_grads_for_grad_norm=lambda: [gradient])
    newer = SimpleNamespace(get_grads_for_grad_norm=lambda: [gradient])
    assert clipping.gradients_for_norm(earlier) == clipping.gradients_for_norm(newer) == [gradient]
