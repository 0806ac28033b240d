"""Checks of learning rate, batch size and their schedules."""

from __future__ import annotations

from collections.abc import Iterator

from keel_megatron.config.run import RunConfig

_FULL, _RAMPUP = "training.global_batch_size", "schedule.rampup_batch_size"


def _warmup(config: RunConfig) -> Iterator[tuple[str, str]]:
    warmup, steps = config.schedule.warmup_steps, config.training.steps
    if warmup >= steps and warmup:
        yield "schedule.warmup_steps", f"{warmup} must be smaller than training.steps = {steps}"


def _decay_after_warmup(config: RunConfig) -> Iterator[tuple[str, str]]:
    schedule, steps = config.schedule, config.training.steps
    if schedule.decay != "wsd" or schedule.warmup_steps >= steps:
        return
    start = round(steps * (1.0 - schedule.decay_fraction))
    if start >= steps:
        yield (
            "schedule.decay_fraction",
            f"{schedule.decay_fraction} of training.steps = {steps} leaves no step to decay in; it "
            f"must be at least {1.0 / steps:.4g}",
        )
    elif start < schedule.warmup_steps:
        yield (
            "schedule.decay_fraction",
            f"{schedule.decay_fraction} overlaps with schedule.warmup_steps = "
            f"{schedule.warmup_steps}; with training.steps = {steps} it must be at most "
            f"{1.0 - schedule.warmup_steps / steps:.4g}",
        )


def _decay_shape(config: RunConfig) -> Iterator[tuple[str, str]]:
    schedule = config.schedule
    if schedule.decay_shape == "linear":
        return
    if schedule.decay != "wsd":
        yield (
            "schedule.decay_shape",
            f"{schedule.decay_shape} needs schedule.decay: wsd (it is {schedule.decay})",
        )
    elif schedule.decay_shape == "exponential" and schedule.min_learning_rate == 0.0:
        yield (
            "schedule.min_learning_rate",
            "0 is not reached by schedule.decay_shape: exponential; set it above 0, such as a "
            "hundredth of optimizer.learning_rate",
        )


def _lowest_rate(config: RunConfig) -> Iterator[tuple[str, str]]:
    low, peak = config.schedule.min_learning_rate, config.optimizer.learning_rate
    if low > peak and config.schedule.decay != "constant":
        yield (
            "schedule.min_learning_rate",
            f"{low} must not exceed optimizer.learning_rate = {peak}",
        )


def _rampup(config: RunConfig) -> Iterator[tuple[str, str]]:
    ramp, full = config.schedule.rampup_batch_size, config.training.global_batch_size
    if ramp is None:
        return
    if ramp.start >= full:
        yield _RAMPUP, f"start {ramp.start} must be smaller than {_FULL} = {full}"
    elif (full - ramp.start) % ramp.increment:
        yield (
            _RAMPUP,
            f"increment {ramp.increment} must divide {_FULL} - start = {full} - {ramp.start} = "
            f"{full - ramp.start}",
        )


def _micro_batch(config: RunConfig) -> Iterator[tuple[str, str]]:
    size = config.training.micro_batch_size
    if config.training.global_batch_size % size:
        yield (
            _FULL,
            f"{config.training.global_batch_size} must be a multiple of "
            f"training.micro_batch_size = {size}",
        )
    elif not any(_rampup(config)) and config.batch_sizes.unit % size:
        yield _every_size(config, f"training.micro_batch_size = {size}")


SCHEDULE_CHECKS = (
    _micro_batch,
    _warmup,
    _decay_after_warmup,
    _decay_shape,
    _lowest_rate,
    _rampup,
)


def batch_problems(config: RunConfig, replicas: int) -> Iterator[tuple[str, str]]:
    """Whether every step's batch divides among the replicas and their schedule.

    Args:
        config: the run.
        replicas: number of replicas.
    """
    parallel, training = config.parallel, config.training
    full, batch = training.global_batch_size, training.micro_batch_size * replicas
    product = f"{training.micro_batch_size} x {replicas} = {batch}"
    if full % batch:
        yield (
            _FULL,
            f"{full} must be a multiple of micro_batch_size x replicas = {product}; replicas are "
            f"processes (--processes) / {parallel.model_parallel_size}",
        )
        return
    group = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    if full // batch % group:
        yield (
            _FULL,
            f"{full} gives {full // batch} micro-batches per replica; interleaving needs a "
            f"multiple of parallel.pipeline = {group}",
        )
        return
    if not any(_rampup(config)) and config.batch_sizes.unit % (batch * group):
        stages = f" x {group} stages (interleaving)" if group > 1 else ""
        yield _every_size(config, f"micro_batch_size x replicas{stages} = {batch * group}")


def _every_size(config: RunConfig, divisor: str) -> tuple[str, str]:
    ramp = config.schedule.rampup_batch_size
    assert ramp is not None
    return (
        _RAMPUP,
        f"start {ramp.start} and increment {ramp.increment} must be multiples of {divisor}, so "
        "that every step's batch is",
    )
