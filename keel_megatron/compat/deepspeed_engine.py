"""DeepSpeed's engine and its ZeRO optimizers; imported before DeepSpeed is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keel_megatron.compat.patch_table import patch


@patch(
    changes="the environment variable DS_ACCELERATOR (unless it is set), DeepSpeed's logger and "
    "`deepspeed.ops.__compatible_ops__`",
    why="DeepSpeed chooses its device itself, logs its configuration from every rank, and on a CPU "
    "compiles a shared-memory all-reduce for minutes at the first use",
    needed_by="deepspeed 0.19.8",
    test="tests/compat/test_deepspeed_engine.py::test_it_is_imported_for_the_runs_device",
)
def import_for(device: str) -> None:
    """Import DeepSpeed for a kind of device, without its log and its shared-memory all-reduce.

    Args:
        device: `cuda` or `cpu`.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@patch(
    changes="the environment variable LOCAL_RANK, unless it is set",
    why="DeepSpeed's engine takes the local rank from nowhere else, and a process that is not "
    "started by torchrun has none there",
    needed_by="deepspeed 0.19.8",
    test="tests/compat/test_deepspeed_engine.py::test_the_local_rank_is_in_the_environment",
)
def set_local_rank(rank: int) -> None:
    """Put the local rank where DeepSpeed reads it."""
    os.environ.setdefault("LOCAL_RANK", str(rank))


@patch(
    changes="`_do_optimizer_sanity_check` in a subclass of DeepSpeedEngine",
    why="for bf16 under ZeRO 1 it takes BF16_Optimizer in place of ZeRO's, whose state is another",
    needed_by="deepspeed 0.19.8",
    test="tests/compat/test_deepspeed_engine.py::test_every_stage_and_type_has_zeros_optimizer",
)
def zero_engine() -> Any:
    """DeepSpeedEngine with ZeRO's own optimizer for every stage and type."""
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    class ZeroEngine(DeepSpeedEngine):
        """With ZeRO's optimizer in every case."""

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
            del basic_optimizer
            return ZERO_OPTIMIZATION

    return ZeroEngine


@contextmanager
@patch(
    changes="`_update_scale` of a ZeRO optimizer, during one step",
    why="ZeRO has no way to refuse a step; a step that overflows in fp16 is skipped, and all "
    "stages ask `overflow` after this call",
    needed_by="deepspeed 0.19.8",
    test="tests/engines/deepspeed/test_engine.py::test_a_refused_step_leaves_no_trace",
)
def refusing(optimizer: Any) -> Iterator[None]:
    """Within the block ZeRO's step drops the gradients and keeps everything else as it is."""

    def refuse(_overflow: bool = False) -> None:
        optimizer.overflow = True

    optimizer._update_scale = refuse
    try:
        yield
    finally:
        del optimizer._update_scale
