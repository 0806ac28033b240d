"""Checks across settings and sections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from keel_megatron.config.engine_checks import ENGINE_CHECKS
from keel_megatron.config.kernel_checks import KERNEL_CHECKS
from keel_megatron.config.model_checks import MODEL_CHECKS
from keel_megatron.config.optimizer_checks import OPTIMIZER_CHECKS
from keel_megatron.config.run import RunConfig
from keel_megatron.config.schedule_checks import SCHEDULE_CHECKS, batch_problems
from keel_megatron.config.tracking_checks import credentials, known_store


def problems(config: RunConfig, world_size: int | None = None) -> Iterator[tuple[str, str]]:
    """Errors across settings, each as (path of the setting, message).

    Args:
        config: a configuration whose single values are valid.
        world_size: number of processes; None skips the checks that need it.
    """
    for check in _CHECKS:
        yield from check(config)
    if world_size is not None:
        yield from _world(config, world_size)


def known_problems(partial: RunConfig, world_size: int | None = None) -> Iterator[tuple[str, str]]:
    """Errors across settings that can be found while some settings are missing or invalid.

    Args:
        partial: a configuration without its invalid settings; a check that reads one raises
            AttributeError and is skipped.
        world_size: as in `problems`.
    """
    for check in _CHECKS:
        with suppress(AttributeError):
            yield from check(partial)
    if world_size is not None:
        with suppress(AttributeError):
            yield from _world(partial, world_size)


def fits(config: RunConfig, world_size: int) -> bool:
    """Whether the layout and the batch of a valid configuration divide among the processes."""
    return not any(_world(config, world_size))


def _multiple_of_tensor(
    path: str, size: Callable[[RunConfig], int]
) -> Callable[[RunConfig], Iterator[tuple[str, str]]]:
    """The check that the tensor-parallel size divides a size."""

    def check(config: RunConfig) -> Iterator[tuple[str, str]]:
        if size(config) % config.parallel.tensor:
            yield (
                path,
                f"{size(config)} must be a multiple of parallel.tensor = {config.parallel.tensor}",
            )

    return check


def _sequence(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.parallel.sequence and config.parallel.tensor == 1:
        yield "parallel.sequence", "true needs parallel.tensor > 1 (set it to false or raise TP)"


def _sequence_length(config: RunConfig) -> Iterator[tuple[str, str]]:
    parallel, seq_length = config.parallel, config.data.seq_length
    if parallel.sequence and seq_length % parallel.tensor:
        yield (
            "data.seq_length",
            f"{seq_length} must be a multiple of parallel.tensor = {parallel.tensor} under "
            "parallel.sequence",
        )


def _virtual_pipeline(config: RunConfig) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            "parallel.virtual_pipeline",
            f"{parallel.virtual_pipeline} needs parallel.pipeline > 1 (or set it to 1)",
        )


def _chunks(config: RunConfig) -> Iterator[tuple[str, str]]:
    parallel, blocks = config.parallel, config.model.blocks
    chunks = parallel.pipeline * parallel.virtual_pipeline
    # The first chunk may hold only the embedding, the last one only the output layer.
    if chunks > 1 and chunks - 2 > blocks:
        yield (
            "parallel.pipeline",
            f"{parallel.pipeline} stages x {parallel.virtual_pipeline} chunks need at least "
            f"{chunks - 2} blocks; model.blocks = {blocks}",
        )


def _layout(config: RunConfig) -> Iterator[tuple[str, str]]:
    parallel, layout, blocks = config.parallel, config.parallel.layout, config.model.blocks
    if layout is None:
        return
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if len(layout) != chunks:
        yield (
            "parallel.layout",
            f"{len(layout)} numbers; parallel.pipeline x parallel.virtual_pipeline = "
            f"{parallel.pipeline} x {parallel.virtual_pipeline} needs {chunks}, one per chunk",
        )
        return
    if sum(layout) != blocks:
        yield (
            "parallel.layout",
            f"the sum is {sum(layout)} blocks; model.blocks = {blocks}",
        )
    empty = [number for number in range(1, chunks - 1) if layout[number] == 0]
    if empty:
        yield (
            "parallel.layout",
            f"chunk {empty[0]} (counted from 0) is empty; only the first, with the embedding, and "
            "the last, with the output layer, may be",
        )


def _keep_optimizer(config: RunConfig) -> Iterator[tuple[str, str]]:
    training = config.training
    if training.keep_optimizer and training.initialize_from is None:
        yield (
            "training.keep_optimizer",
            "true needs training.initialize_from, whose optimizer state is kept",
        )
    if training.keep_position and not training.keep_optimizer:
        yield (
            "training.keep_position",
            "true needs training.keep_optimizer: true; a run continues with its optimizer state",
        )


def _hang_timeout(config: RunConfig) -> Iterator[tuple[str, str]]:
    watchdog, collective = config.training.hang_timeout, config.parallel.timeout_seconds
    if watchdog is not None and watchdog >= collective:
        yield (
            "training.hang_timeout",
            f"{watchdog:g} must be smaller than parallel.timeout_seconds = {collective:g}; "
            "otherwise the collective times out before the watchdog can name the hanging rank",
        )


def _attention(config: RunConfig) -> Iterator[tuple[str, str]]:
    chosen = config.kernels.attention
    if chosen != "auto" and config.kernels.backend == "transformer_engine":
        yield (
            "kernels.attention",
            f"{chosen} has no effect on Transformer Engine, which has its own attention; remove "
            "it, or set kernels.backend to torch",
        )
    if chosen == "cudnn" and config.training.deterministic:
        yield (
            "kernels.attention",
            "cudnn is not deterministic; set it to auto or flash, or training.deterministic to "
            "false",
        )


def _deterministic(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.training.deterministic and config.kernels.backend == "transformer_engine":
        yield (
            "training.deterministic",
            "true has no effect on Transformer Engine's kernels; set kernels.backend to torch",
        )


def _guard_window(config: RunConfig) -> Iterator[tuple[str, str]]:
    window, least = config.guard.window, config.guard.min_steps
    if least > window:
        yield "guard.min_steps", f"{least} must not exceed guard.window = {window}"


def _keep_every(config: RunConfig) -> Iterator[tuple[str, str]]:
    kept, every = config.checkpoint.keep_every, config.checkpoint.every
    if kept and not (every and kept % every == 0):
        yield (
            "checkpoint.keep_every",
            f"{kept} must be a multiple of checkpoint.every = {every}, or 0",
        )


def _fp8(config: RunConfig) -> Iterator[tuple[str, str]]:
    kernels, training = config.kernels, config.training
    if kernels.fp8 != "none" and (
        kernels.backend != "transformer_engine" or training.precision != "bf16"
    ):
        yield (
            "kernels.fp8",
            f"{kernels.fp8} needs kernels.backend: transformer_engine and training.precision: bf16",
        )


_CHECKS: tuple[Callable[[RunConfig], Iterator[tuple[str, str]]], ...] = (
    *MODEL_CHECKS,
    _multiple_of_tensor("model.num_attention_heads", lambda run: run.model.num_attention_heads),
    _multiple_of_tensor("model.num_query_groups", lambda run: run.model.query_groups),
    _multiple_of_tensor("model.ffn_hidden_size", lambda run: run.model.ffn_hidden_size),
    _multiple_of_tensor("data.vocab_size", lambda run: run.data.vocab_size),
    _sequence,
    _sequence_length,
    _virtual_pipeline,
    _chunks,
    _layout,
    _keep_optimizer,
    _hang_timeout,
    _attention,
    _deterministic,
    _guard_window,
    _keep_every,
    credentials,
    known_store,
    _fp8,
    *ENGINE_CHECKS,
    *SCHEDULE_CHECKS,
    *KERNEL_CHECKS,
    *OPTIMIZER_CHECKS,
)
"""One check each, so that an invalid setting skips as few checks as possible."""


def _world(config: RunConfig, world_size: int) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    replica = parallel.model_parallel_size
    if world_size % replica:
        yield (
            "parallel.tensor x parallel.pipeline",
            f"{parallel.tensor} x {parallel.pipeline} = {replica} must divide the "
            f"{world_size} process(es) of this launch; start {replica} or a multiple of it "
            f"(keel train --processes {replica}; torchrun --nproc-per-node), or change the layout",
        )
        return
    yield from batch_problems(config, world_size // replica)
