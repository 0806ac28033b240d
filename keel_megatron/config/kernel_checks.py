"""Settings that `kernels.compile` and `kernels.cuda_graphs` do not support."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from keel_megatron.config.run import RunConfig

Check = Callable[[RunConfig], Iterator[tuple[str, str]]]
Switch = Literal["compile", "cuda_graphs"]


def _not_with(switch: Switch, path: str, is_set: Callable[[RunConfig], bool], reason: str) -> Check:
    """The check that a setting which a switch of `kernels` does not support is not set."""

    def check(config: RunConfig) -> Iterator[tuple[str, str]]:
        if getattr(config.kernels, switch) and is_set(config):
            yield path, f"is not supported with kernels.{switch}: {reason}"

    return check


def supports_light_recomputation(config: RunConfig) -> bool:
    """Whether blocks keep what `parallel.recompute: light` frees."""
    return not config.kernels.compile and config.kernels.backend != "transformer_engine"


def _light_backend(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Transformer Engine's layers copy or cast what they keep."""
    asked = config.parallel.recompute == "light"
    if asked and config.kernels.backend == "transformer_engine":
        yield (
            "parallel.recompute",
            "light is not supported with kernels.backend: transformer_engine, whose layers keep "
            "their own copies; set it to none, full or auto",
        )


def _documents_backend(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Transformer Engine's attention takes borders in a layout of its own."""
    if config.data.document_masks and config.kernels.backend == "transformer_engine":
        yield (
            "data.document_masks",
            "is not supported with kernels.backend: transformer_engine, whose attention has not "
            "been tried with documents; set it to false, or kernels.backend to auto or torch",
        )


KERNEL_CHECKS: tuple[Check, ...] = (
    _not_with(
        "compile",
        "parallel.tensor",
        lambda run: run.parallel.tensor > 1,
        "a compiled block cannot contain communication; set it to 1",
    ),
    _not_with(
        "compile",
        "kernels.backend",
        lambda run: run.kernels.backend in ("apex", "transformer_engine"),
        "torch cannot compile their kernels; set it to auto or torch",
    ),
    _not_with(
        "compile",
        "model.dropout",
        lambda run: run.model.dropout > 0.0,
        "compiled blocks draw different dropout masks; set it to 0",
    ),
    _not_with(
        "compile",
        "deepspeed.zero_stage",
        lambda run: run.training.engine == "deepspeed" and run.deepspeed.zero_stage == 3,
        "a compiled block needs its whole weights, and stage 3 gathers them per module; set it to "
        "1 or 2",
    ),
    _not_with(
        "compile",
        "parallel.recompute",
        lambda run: run.parallel.recompute == "light",
        "torch's compiler chooses what a compiled block keeps; set it to none, full or auto",
    ),
    _not_with(
        "cuda_graphs",
        "training.device",
        lambda run: run.training.device == "cpu",
        "a CPU has no CUDA graphs; set it to cuda, or kernels.cuda_graphs to false",
    ),
    _not_with(
        "cuda_graphs",
        "training.engine",
        lambda run: run.training.engine == "deepspeed",
        "the next replay overwrites gradients that ZeRO still holds; set it to megatron",
    ),
    _not_with(
        "cuda_graphs",
        "training.precision",
        lambda run: run.training.precision == "fp32",
        "fp32 layers accumulate gradients in place, and the capture would add its own; set it to "
        "bf16",
    ),
    _not_with(
        "cuda_graphs",
        "parallel.tensor",
        lambda run: run.parallel.tensor > 1,
        "communication of the tensor-parallel group cannot be captured; set it to 1",
    ),
    _not_with(
        "cuda_graphs",
        "parallel.pipeline",
        lambda run: run.parallel.pipeline > 1,
        "a graph holds the activations of one micro-batch, and a pipeline has several in flight; "
        "set it to 1",
    ),
    _not_with(
        "cuda_graphs",
        "parallel.recompute",
        lambda run: run.parallel.recompute == "full",
        "captured blocks cannot be recomputed as a whole; set it to none or light, or to auto "
        "where memory suffices",
    ),
    _not_with(
        "cuda_graphs",
        "kernels.backend",
        lambda run: run.kernels.backend in ("apex", "transformer_engine"),
        "only torch's modules can be captured; set it to auto or torch",
    ),
    _not_with(
        "cuda_graphs",
        "model.dropout",
        lambda run: run.model.dropout > 0.0,
        "a replay does not advance the run's random generators; set it to 0",
    ),
    _not_with(
        "cuda_graphs",
        "data.document_masks",
        lambda run: run.data.document_masks,
        "a graph replays one number of documents, and every micro-batch has another; set it to "
        "false",
    ),
    _not_with(
        "compile",
        "model.stream",
        lambda run: run.model.stream != "fp32",
        "compiled blocks have an fp32 stream; set it to fp32, or kernels.compile to false",
    ),
    _not_with(
        "cuda_graphs",
        "model.stream",
        lambda run: run.model.stream != "fp32",
        "captured blocks have an fp32 stream; set it to fp32, or kernels.cuda_graphs to false",
    ),
    _documents_backend,
    _light_backend,
)
"""One check each, as in `checks.py`."""
