"""Decodes on a CUDA device that is not there, in a process of its own."""

from __future__ import annotations

import os
import traceback
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.distributed import CONTEXT
from tests.settings import settings


def trace_steps(overrides: dict[str, Any], *, fault: bool = False) -> dict[str, dict[str, int]]:
    """What the host waits for, and operators on two devices, in a plain and a static step.

    Args:
        overrides: settings of the run, as of `tests.settings.settings`.
        fault: let the static column look at its place on the host.
    """
    with ProcessPoolExecutor(1, CONTEXT, max_tasks_per_child=1) as pool:
        found: dict[str, dict[str, int]] | str = pool.submit(_trace, overrides, fault).result()
    assert not isinstance(found, str), found
    return found


def _trace(overrides: dict[str, Any], fault: bool) -> dict[str, dict[str, int]] | str:
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        return _traced(overrides, fault)
    except Exception:
        return traceback.format_exc()


def _traced(overrides: dict[str, Any], fault: bool) -> dict[str, dict[str, int]]:
    import torch
    from torch._subclasses import FakeTensorMode

    from keel_megatron.config.run import RunConfig
    from keel_megatron.layout.devices import device_named
    from keel_megatron.planner.trace import rank
    from keel_megatron.planner.trace.device import CUDA

    config = RunConfig.model_validate(settings(**overrides, training__device="cuda"))
    request = rank.Request(config, 1, device_named("h200"), 0, strict=True)
    tracker = rank._install(request)
    runtime = rank._start_groups(request)
    from keel_megatron.inference.decoder import Decoder
    from keel_megatron.inference.static_step import StaticStep
    from keel_megatron.model.language_model import build_model

    with FakeTensorMode(allow_non_fake_inputs=True), tracker, torch.inference_mode():
        with torch.device(CUDA):
            (chunk,) = build_model(config, runtime)
        decoder = Decoder(chunk, config.model, runtime)
        decoder._require_memory = lambda _heads: None  # type: ignore[method-assign]
        decoder.prefill([[1, 2, 3], [4]], 5)
        decoder.step([1, 2])
        assert decoder._cache is not None
        step = StaticStep(decoder._forward, decoder._cache)
        if fault:
            _read_place(step)
        call = step.plain(8)
        tracker.enter("static step")
        logits = call()
    assert logits is not None
    assert logits.shape == (2, config.data.vocab_size)
    phase = tracker.phases["static step"]
    return {"waits": dict(phase.waits), "mixed": dict(phase.mixed), "kernels": phase.kernels}


def _read_place(step: Any) -> None:
    """The column's number on the host, as a slice's end."""
    forward = step._forward

    def read(tokens: Any, column: Any) -> Any:
        int(step._place)
        return forward(tokens, column)

    step._forward = read
