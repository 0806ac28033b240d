"""The smallest change of settings with which a run fits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from keel_megatron.config.checks import problems
from keel_megatron.config.run import RunConfig
from keel_megatron.planner.plan import Plan, make_plan

Change = dict[str, Any]
_SMALL_LOGITS = 512.0
"""MiB at which the head's matrix products are still efficient (`kernels.logits_mib`)."""


def smallest_change(plan: Plan, *, more_gpus: bool) -> tuple[list[str], Plan] | None:
    """Find overrides with which a plan fits, by trying the least intrusive first.

    Args:
        plan: a plan that does not fit.
        more_gpus: whether the layout may use more devices.

    Returns:
        The overrides and the plan with them, or None if no tried change fits.
    """
    for change in _changes(plan.config):
        config = _changed(plan.config, change)
        replica = config.parallel.model_parallel_size
        gpus = replica * plan.data_parallel if more_gpus else plan.gpus
        if any(True for _problem in problems(config, gpus)):
            continue
        other = make_plan(config, gpus, plan.device)
        if other.fits:
            return [f"{path}={_shown(value)}" for path, value in change.items()], other
    return None


def _changes(config: RunConfig) -> Iterator[Change]:
    """One setting at a time, then each of them with recomputation."""
    recompute = {"parallel.recompute": "auto"}
    single = list(_single_changes(config))
    smaller: Change = {"kernels.logits_mib": _SMALL_LOGITS}
    if config.kernels.logits_mib > _SMALL_LOGITS:
        yield smaller
    if config.parallel.recompute == "none":
        yield recompute
        if config.kernels.logits_mib > _SMALL_LOGITS:
            yield {**recompute, **smaller}
    yield from single
    if config.parallel.recompute == "none":
        yield from ({**recompute, **change} for change in single)


def _single_changes(config: RunConfig) -> Iterator[Change]:
    parallel, training = config.parallel, config.training
    if training.engine == "deepspeed":
        yield from _more_zero(config)
    if parallel.tensor > 1 and not parallel.sequence:
        yield {"parallel.sequence": True}
    if not parallel.distributed_optimizer:
        yield {"parallel.distributed_optimizer": True}
    size = training.micro_batch_size
    while size > 1:
        size //= 2
        yield {"training.micro_batch_size": size}
    # With more stages, a layout given by hand no longer applies.
    again: Change = {} if parallel.layout is None else {"parallel.layout": None}
    pipeline, tensor = parallel.pipeline, parallel.tensor
    for factor in (2, 4, 8, 16, 32):
        yield {"parallel.pipeline": pipeline * factor, **again}
        sequence = training.engine == "megatron"
        yield {"parallel.tensor": tensor * factor, "parallel.sequence": sequence}


def _more_zero(config: RunConfig) -> Iterator[Change]:
    """Higher ZeRO stages, then offloading."""
    own = config.deepspeed
    stages = range(own.zero_stage + 1, 4)
    yield from ({"deepspeed.zero_stage": stage} for stage in stages)
    if not own.offload_optimizer:
        offload = {"deepspeed.offload_optimizer": True}
        yield offload
        yield from ({"deepspeed.zero_stage": stage, **offload} for stage in stages)
    if not own.offload_parameters:
        yield {
            "deepspeed.zero_stage": 3,
            "deepspeed.offload_optimizer": True,
            "deepspeed.offload_parameters": True,
        }


def _changed(config: RunConfig, change: Change) -> RunConfig:
    for path, value in change.items():
        name, key = path.split(".")
        section = getattr(config, name).model_copy(update={key: value})
        config = config.model_copy(update={name: section})
    return config


def _shown(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value))
