"""Builds the engine that the configuration names."""

from __future__ import annotations

from torch import nn

from keel_megatron.config.run import RunConfig
from keel_megatron.engines.base import Engine
from keel_megatron.engines.megatron.engine import MegatronEngine
from keel_megatron.model.compiled import compile_blocks
from keel_megatron.model.graphs import record_blocks
from keel_megatron.runtime.distributed import Runtime


def build_engine(config: RunConfig, runtime: Runtime, chunks: list[nn.Module]) -> Engine:
    """The engine that `training.engine` names, around this rank's model chunks.

    Their blocks are compiled or recorded as `kernels` says.

    Raises:
        UserError: the engine is not installed, or `kernels` asks for what this machine lacks.
    """
    if config.kernels.compile:
        compile_blocks(chunks, runtime.device)
    if config.kernels.cuda_graphs:
        record_blocks(chunks, runtime.device)
    if config.training.engine == "deepspeed":
        # Imported late: DeepSpeed takes seconds to import, and may not be installed.
        from keel_megatron.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, runtime, chunks)
    return MegatronEngine(config, runtime, chunks)
