"""The optimizer's sharded state, and back."""

from __future__ import annotations

from typing import Any

from keel_megatron.compat import adamw


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
    with adamw.fp32_parameters_described(inner):
        return optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)


def load_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Restore the optimizer's step, then masters and moments.

    The groups' settings (betas, epsilon, decay) stay as they are here: a run may change them
    between two starts, and torch's own `load_state_dict` would take those of the checkpoint.
    """
    (inner,) = optimizer.chained_optimizers
    own = [_settings(group) for group in inner.optimizer.param_groups]
    sharded = loaded.pop("param_state", None)
    adamw.identify_groups(loaded.get("optimizer", loaded)["param_groups"], own)
    optimizer.load_state_dict(loaded)
    for group, settings in zip(inner.optimizer.param_groups, own, strict=True):
        group.update(settings)
    if sharded is not None:
        adamw.load_parameter_state(inner, sharded)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A group's settings, without its parameters and the step that some Adams keep there."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}
