"""Which operations run as Triton kernels."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from keel_megatron.config.kernels import KernelsConfig, TritonKernel
from keel_megatron.kernels import selection
from keel_megatron.kernels.selection import use_triton


class OnCuda:
    """A tensor on CUDA, as far as a selection looks."""

    is_cuda = True


CUDA: Any = OnCuda()


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_selected", None)
    monkeypatch.setattr(selection, "triton_is_installed", lambda: True)


def test_all_are_by_default_and_none_on_a_cpu() -> None:
    class OnCpu(OnCuda):
        is_cuda = False

    cpu: Any = OnCpu()
    for name in get_args(TritonKernel):
        assert use_triton(name, CUDA, "auto", fits=True)
        assert not use_triton(name, CUDA, "auto", fits=False)
        assert not use_triton(name, CUDA, "torch", fits=True)
        assert not use_triton(name, cpu, "auto", fits=True)
        assert use_triton(name, cpu, "triton", fits=True)


def test_the_setting_turns_them_off() -> None:
    assert KernelsConfig().triton == get_args(TritonKernel)
    selection.select(KernelsConfig(triton=("rotary",)).triton)
    used = [name for name in get_args(TritonKernel) if use_triton(name, CUDA, "auto", fits=True)]
    assert used == ["rotary"]
    selection.select(KernelsConfig(triton=()).triton)
    assert not use_triton("rotary", CUDA, "auto", fits=True)


def test_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "triton_is_installed", lambda: False)
    assert not use_triton("rotary", CUDA, "auto", fits=True)
