"""The optimizer's sharded state, around the traps of megatron-core 0.16.1."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params


def sharded_optimizer_state(
    optimizer: Any, models: dict[str, Any], metadata: dict[str, Any], is_loading: bool
) -> dict[str, Any]:
    """Masters, moments and groups with their places in the global tensors.

    Args:
        optimizer: a chain of one Megatron-core optimizer.
        models: the sharded state of the model chunks.
        metadata: how they are sharded.
        is_loading: whether the state will be filled.
    """
    (inner,) = optimizer.chained_optimizers
    if not isinstance(inner, Float16OptimizerWithFloat16Params):
        return optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    # It looks up the half-precision parameters alone, and fails on those that are fp32 in a
    # bf16 model: the norms' gains, which make up groups of their own.
    half = inner.float16_groups
    inner.float16_groups = [
        [*low, *full] for low, full in zip(half, inner.fp32_from_fp32_groups, strict=True)
    ]
    try:
        return optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    finally:
        inner.float16_groups = half


def load_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Restore the optimizer's step, then masters and moments.

    The groups' settings (betas, epsilon, decay) stay as they are here: a run may change them
    between two starts, and torch's own `load_state_dict` would take those of the checkpoint.

    With torch's AdamW, which counts its steps per parameter, the distributed optimizer looks in one
    call for `step` among the sharded tensors, where it is not, so it is set aside while those are
    loaded; and it gives all parameters one and the same counter, which each of them would then
    advance.
    """
    (inner,) = optimizer.chained_optimizers
    own = [_settings(group) for group in inner.optimizer.param_groups]
    sharded = loaded.pop("param_state", None)
    if sharded is not None:
        _complete_groups(loaded["optimizer"]["param_groups"], own)
    optimizer.load_state_dict(loaded)
    for group, settings in zip(inner.optimizer.param_groups, own, strict=True):
        group.update(settings)
    if sharded is None:
        return
    states = inner.optimizer.state.values()
    steps = [state.pop("step") for state in states]
    inner.load_parameter_state_from_fully_reshardable(sharded)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step.clone()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A group's settings, without its parameters and the step that some Adams keep there."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _complete_groups(loaded: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Give loaded groups the settings that this optimizer's have and theirs lack.

    Another Adam (torch's, Apex's, Transformer Engine's) or another engine has written them.
    """
    for group in loaded:
        like = next(g for g in own if g["wd_mult"] == group["wd_mult"])
        for key, value in like.items():
            group.setdefault(key, value)
