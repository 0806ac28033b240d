"""Which modules and fusions `kernels.backend` comes to, with made-up libraries."""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.config.checks import problems
from keel_megatron.errors import UserError
from keel_megatron.kernels import libraries
from keel_megatron.model.backend import Backend, choose_backend
from tests.settings import small_config

APEX = ("amp_C", "apex.optimizers", "fused_weight_gradient_mlp_cuda")
TE = ("transformer_engine.pytorch",)
LOCAL, FUSED = Backend("local", False), Backend("local", True)


def install(patch: pytest.MonkeyPatch, *names: str) -> None:
    patch.setattr(libraries, "_imports", lambda name: name in names)


@pytest.mark.parametrize(
    ("backend", "device", "installed", "expected"),
    [
        ("auto", "cuda", (), LOCAL),
        ("auto", "cuda", APEX, FUSED),
        ("auto", "cuda", TE, LOCAL),
        ("auto", "cpu", APEX, LOCAL),
        ("torch", "cuda", (*APEX, *TE), LOCAL),
        ("apex", "cuda", APEX, FUSED),
        ("transformer_engine", "cuda", TE, Backend("transformer_engine", True)),
    ],
)
def test_what_is_there_is_used(
    backend: str,
    device: str,
    installed: tuple[str, ...],
    expected: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, *installed)
    assert choose_backend(small_config(kernels__backend=backend), device) == expected


@pytest.mark.parametrize("backend", ["auto", "apex"])
def test_zero_accumulates_its_own_gradients(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *APEX)
    config = small_config(kernels__backend=backend, training__engine="deepspeed")
    assert choose_backend(config, "cuda") == LOCAL


@pytest.mark.parametrize("backend", ["apex", "transformer_engine"])
@pytest.mark.parametrize("installed", [(), ("apex.optimizers",)])
def test_what_is_asked_for_and_absent_is_refused(
    backend: str, installed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package apex from PyPI has none of the extensions."""
    install(monkeypatch, *installed)
    with pytest.raises(UserError, match=rf"kernels.backend: {backend} .* choose torch"):
        choose_backend(small_config(kernels__backend=backend), "cuda")


def test_nothing_of_nvidia_is_found_here() -> None:
    """The way itself, where none of them is installed."""
    assert not libraries.has_apex_adam()
    assert not libraries.has_gradient_fusion()
    assert not libraries.has_transformer_engine()


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        ({"kernels__backend": "transformer_engine", "training__precision": "bf16"}, True),
        ({"kernels__backend": "torch", "training__precision": "bf16"}, False),
        ({"kernels__backend": "transformer_engine"}, False),
    ],
)
def test_fp8_needs_transformer_engine_and_bf16(overrides: dict[str, Any], fits: bool) -> None:
    config = small_config(kernels__fp8="hybrid", **overrides)
    assert ("kernels.fp8" in dict(problems(config))) != fits
