"""Very deep models on four CPU stages.

The learning rate is one at which the deep run is stable from the first step on, without a warm-up.
At 1e-3 its gradient norm jumps, and rounding grows from step to step: there the same comparison of
50 steps is off by 1.7e-4 in losses.
"""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.layout.devices import DEVICES
from keel_megatron.layout.stages import partition
from tests.settings import small_config
from tests.training.matrix import Found, deviation, trained

DEEP: dict[str, Any] = {
    "model__blocks": 512,
    "model__hidden_size": 16,
    "model__ffn_hidden_size": 32,
    "model__num_attention_heads": 2,
    "model__num_query_groups": 2,
    "data__seq_length": 16,
    "data__vocab_size": 320,
    "optimizer__learning_rate": 1e-4,
    "training__global_batch_size": 4,
    "training__micro_batch_size": 2,
}
TIMEOUT_SECONDS = 3600.0


@pytest.mark.slow
def test_1024_sub_layers_train_on_four_stages_like_on_one() -> None:
    alone: Found = trained(1, {"deep": DEEP}, 50, TIMEOUT_SECONDS)["deep"]
    runs = {"deep": {**DEEP, "parallel__pipeline": 4}}
    spread: Found = trained(4, runs, 50, TIMEOUT_SECONDS)["deep"]
    apart = deviation(spread, alone)
    print(f"1024 sub-layers, 50 steps, 4 stages: {apart}")
    assert len({norm for _loss, norm in alone}) == len(alone) == 51  # something moves
    assert max(apart.loss, apart.grad_norm) <= 1e-5


@pytest.mark.slow
def test_4096_sub_layers_are_cut_built_and_step_once() -> None:
    deeper = {**DEEP, "model__blocks": 2048, "parallel__pipeline": 4}
    stages = partition(small_config(**deeper), 1, DEVICES["cpu"]).stages
    assert sum(stage.blocks for stage in stages) == 2048
    assert max(stage.blocks for stage in stages) - min(stage.blocks for stage in stages) <= 3
    found = trained(4, {"deeper": deeper}, 1, TIMEOUT_SECONDS)["deeper"]
    for loss, norm in found:
        assert 0 < loss < 10
        assert 0 < norm < 100
