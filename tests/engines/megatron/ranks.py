"""What the ranks of the overlap tests run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.config.run import RunConfig
from tests.training.ranks import made_up_batches, observed_steps

Steps = list[tuple[float, float]]


class LateGather:
    """A gather whose weights arrive when they are waited for, and not before."""

    def __init__(self, group: Any, start: Any) -> None:
        self._group, self._start = group, start

    def wait(self) -> None:
        self._group.param_gather_handle = None
        self._start(self._group, force_sync=True)


@contextmanager
def late_gathers(bucket_size: int | None = 1) -> Iterator[list[LateGather]]:
    """Within the block overlapped gathers are as late as can be.

    Gives those that were started. Every parameter has a bucket of its own.
    """
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from keel_megatron.engines.megatron import optimizer

    started: list[LateGather] = []
    real = _ParamAndGradBucketGroup.start_param_sync

    def start(group: Any, force_sync: bool = False) -> None:
        if force_sync or not group.ddp_config.overlap_param_gather:
            real(group, force_sync=force_sync)
            return
        assert group.param_gather_handle is None
        group.param_gather_handle = LateGather(group, real)
        started.append(group.param_gather_handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ParamAndGradBucketGroup, "start_param_sync", start)
        patch.setattr(optimizer, "BUCKET_SIZE", bucket_size)
        yield started


def with_and_without(runs: list[dict[str, Any]]) -> list[tuple[Steps, Steps, int]]:
    """Steps of which two are observed, and a validation: overlapped, not; gathers started."""
    found = []
    for sections in runs:
        with late_gathers() as started:
            overlapped = observed_steps(overlapping(sections, True), 5)
            gathers = len(started)
        found.append((overlapped, observed_steps(overlapping(sections, False), 5), gathers))
    return found


def overlapping(sections: dict[str, Any], value: bool) -> dict[str, Any]:
    """The sections with overlapped communication, or without."""
    parallel = dict(sections.get("parallel", {}))
    parallel["overlap_grad_reduce"] = value
    parallel["overlap_param_gather"] = value and parallel.get("distributed_optimizer", True)
    return {**sections, "parallel": parallel}


def order_of_reductions(sections: dict[str, Any]) -> tuple[list[str], int]:
    """What happened in the third step, in order, and how many bucket groups there are."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from keel_megatron.engines.megatron.engine import MegatronEngine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    events: list[str] = []
    reduce = _ParamAndGradBucketGroup.start_grad_sync

    def noted(group: Any, *arguments: Any, **named: Any) -> None:
        events.append("reduce")
        reduce(group, *arguments, **named)

    with (
        start(config.parallel, config.training) as runtime,
        late_gathers(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(_ParamAndGradBucketGroup, "start_grad_sync", noted)
        engine = MegatronEngine(config, runtime, build_model(config, runtime))
        settings: Any = engine.chunks[0].config
        finalize = settings.finalize_model_grads_func

        def finalized(*arguments: Any, **named: Any) -> None:
            events.append("finalize")
            finalize(*arguments, **named)

        settings.finalize_model_grads_func = finalized
        for step in range(3):
            events.clear()
            batches = made_up_batches(config, runtime, step)
            engine.train_step(batches, len(batches), 1e-3)
        return events, sum(len(chunk.bucket_groups) for chunk in engine.model)


def saved_and_resumed(sections: dict[str, Any]) -> tuple[list[Any], str]:
    """A run's losses and the digest of its state; gathers are late."""
    from tests.checkpoint.ranks import run

    with late_gathers(bucket_size=None):  # a rank's share depends on where buckets end
        ran = run(sections)
    assert ran.error is None
    return ran.losses, ran.digest


def run_both(pairs: list[dict[str, Any]]) -> list[tuple[list[Any], str]]:
    """`saved_and_resumed` of several runs in the same processes."""
    return [saved_and_resumed(sections) for sections in pairs]


def shards(run: Path, step: int) -> dict[str, bytes]:
    """The files of a checkpoint's tensors, by name."""
    from keel_megatron.checkpoint import folder, manifest

    found = folder.step_folder(run, step)
    return {
        path.name: path.read_bytes()
        for path in sorted(found.iterdir())
        if manifest.rank_of(path.name) is not None
    }


def groups_left(sections: dict[str, dict[str, Any]]) -> int:
    """Threads of gloo's process groups after a run that has ended: two for each group."""
    observed_steps(sections, 1)
    gc.collect()
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)
