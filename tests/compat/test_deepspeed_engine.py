"""DeepSpeed as this project starts it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from keel_megatron.compat import deepspeed_engine
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import zero
from tests.settings import settings

pytest.importorskip("deepspeed")


def imported() -> tuple[str, str, int, bool]:
    import logging

    os.environ.pop("DS_ACCELERATOR", None)
    deepspeed_engine.import_for("cpu")
    import deepspeed

    device = deepspeed.accelerator.get_accelerator().device_name()
    shared_memory = deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]
    return os.environ["DS_ACCELERATOR"], device, logging.getLogger("DeepSpeed").level, shared_memory


def test_it_is_imported_for_the_runs_device() -> None:
    assert run_ranks(1, imported) == [("cpu", "cpu", 40, False)]


def test_the_local_rank_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "7")
    deepspeed_engine.set_local_rank(3)
    assert os.environ["LOCAL_RANK"] == "7"
    monkeypatch.delenv("LOCAL_RANK")
    deepspeed_engine.set_local_rank(3)
    assert os.environ["LOCAL_RANK"] == "3"


def optimizer_of(sections: dict[str, Any]) -> str:
    from keel_megatron.config.run import RunConfig
    from keel_megatron.engines.deepspeed.engine import DeepSpeedEngine
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    config = RunConfig.model_validate(sections)
    with start(config.parallel, config.training) as runtime:
        engine = DeepSpeedEngine(config, runtime, build_model(config, runtime))
        return type(engine._optimizer).__name__


def test_every_stage_and_type_has_zeros_optimizer() -> None:
    """Bf16 under stage 1, which DeepSpeed would give another one."""
    sections = settings(**zero(1), training__precision="bf16", model__blocks=1)
    assert run_ranks(1, optimizer_of, sections) == ["DeepSpeedZeroOptimizer"]
