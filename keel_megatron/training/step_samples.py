"""Which training samples a step reads: by the run's own records, then by its settings.

The records are needed because the global batch size may change when a run resumes, and because a
rollback skips samples.
"""

from __future__ import annotations

from typing import Any

from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.tracking.metrics import iterate_metrics
from keel_megatron.tracking.run_log import METRICS_FILE
from keel_megatron.training.origin import position_of_origin

_NEEDED = ("consumed_samples", "consumed_tokens", "tokens_per_second", "seconds")
"""Values of a step's record; other records lack one."""


def samples_of_step(config: RunConfig, step: int) -> tuple[range, str]:
    """The numbers of a step's samples, and how they are known.

    Args:
        config: the run, whose folder need not exist.
        step: the step, at least 1.

    Raises:
        UserError: the run has no such step, or no record of it although it has passed it.
    """
    steps = config.training.steps
    if step > steps:
        raise UserError(f"--step: {step} is after the last step of the run, {steps}")
    path = config.training.folder / METRICS_FILE
    newest = recorded = None
    for record in iterate_metrics(path):
        if all(name in record for name in _NEEDED):
            newest = record
            recorded = record if record["step"] == step else recorded
    if recorded is not None:
        return _recorded(recorded, str(path)), f"as recorded in {path}"
    if newest is not None:
        start, consumed = newest["step"], _recorded(newest, str(path)).stop
        if start > step:
            raise UserError(f"--step: {path} has no record of step {step}, only of later ones")
        known = f"counted on from step {start} of {path}"
    elif (origin := position_of_origin(config)) is not None:
        start, consumed = origin
        if start >= step:
            raise UserError(
                f"--step: the run starts after step {start} of training.initialize_from, "
                f"{config.training.initialize_from}; give a later step"
            )
        known = f"counted on from step {start} of {config.training.initialize_from}"
    else:
        start, consumed, known = 0, 0, f"counted from step 1, as {path} has no steps"
    first = consumed + config.batch_sizes.samples_of(step - 1 - start, consumed)
    return range(first, first + config.batch_sizes.at(first)), known


def _recorded(record: dict[str, Any], path: str) -> range:
    """The samples of a recorded step: the last ones that it had consumed.

    Their number follows from the record itself, as the step before may be missing, or be one to
    which the run was rolled back: tokens_per_second is their tokens divided by `seconds`.
    """
    consumed, tokens, speed, seconds = (record[name] for name in _NEEDED)
    try:
        size = round(speed * seconds * consumed / tokens)
        if type(consumed) is int and 0 < size <= consumed:
            return range(consumed - size, consumed)
    except (TypeError, ValueError, ArithmeticError):
        pass
    raise UserError(f"{path}: the record of step {record['step']} is not that of a step")
