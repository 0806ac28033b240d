"""The table of residual rules: a new row is all that a new rule needs, and no column is ignored."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields

import pydantic
import pytest
import torch

from keel_megatron.architecture.flops import training_flops_per_token
from keel_megatron.architecture.parameters import COUNTS
from keel_megatron.architecture.residual import RULES, Reader, SubLayer
from keel_megatron.config.schema import json_schema
from keel_megatron.depth.collector import PROFILE
from keel_megatron.errors import UserError
from keel_megatron.layout.block_costs import COSTS, typical_rows
from keel_megatron.layout.devices import device_named
from keel_megatron.model.compiled import COMPILED
from keel_megatron.model.layer import BLOCKS
from keel_megatron.planner.plan import make_plan
from keel_megatron.planner.report import describe
from keel_megatron.studies.gradient_flow import ANALYSIS
from tests.architecture.rules import GATED, HALF, added_rules
from tests.distributed import run_ranks
from tests.settings import settings, small_config
from tests.training.ranks import made_up_batches

READERS = (BLOCKS, COMPILED, COSTS, COUNTS, PROFILE, ANALYSIS)


@pytest.fixture
def rules() -> Iterator[None]:
    with added_rules():
        yield


def test_the_table_needs_neither_torch_nor_the_configuration() -> None:
    code = (
        "import sys, keel_megatron.architecture.residual; "
        "print([m for m in sys.modules if m in ('torch', 'pydantic', 'keel_megatron.config')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_reader_knows_every_column_and_rule() -> None:
    for reader in READERS:
        assert set(reader.columns) == {field.name for field in fields(SubLayer)}, reader.path
        for rule in RULES:
            model = small_config(model__residual=rule).model
            assert all(reader.sub_layer(l, model) for l in range(model.sub_layers))


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.path)
def test_a_column_that_a_path_does_not_know_is_refused_there(reader: Reader, rules: None) -> None:
    model = small_config(model__residual=GATED).model
    with pytest.raises(UserError) as error:
        reader.sub_layer(3, model)
    for part in (f"model.residual: {GATED}", "gate = 0.5", reader.path):
        assert part in str(error.value)


def test_a_column_at_its_default_and_a_kind_of_inner_are_told_apart(rules: None) -> None:
    narrow = Reader("a path", ("inner",), inner=("none",))
    assert narrow.sub_layer(1, small_config(model__residual="hybrid_norm").model) == SubLayer()
    for rule, column in (("pre_ln", "inner = norm"), ("post_ln", "outer_norm = True")):
        why = f"{column} in sub-layer 0, which a path does not support"
        with pytest.raises(UserError, match=why):
            narrow.sub_layer(0, small_config(model__residual=rule).model)


def test_the_configuration_takes_the_rules_of_the_table(rules: None) -> None:
    assert small_config(model__residual=HALF).model.residual == HALF
    assert json_schema()["$defs"]["ModelConfig"]["properties"]["residual"]["enum"] == list(RULES)


def test_a_rule_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="must be one of keel, pre_ln"):
        small_config(model__residual=HALF)


def test_a_new_rule_is_planned(rules: None) -> None:
    """Pre-norm's parameters, FLOPs and memory; a product more in every join's time."""
    config, known = small_config(model__residual=HALF), small_config(model__residual="pre_ln")
    plans = [make_plan(one, 1, device_named("h200")) for one in (config, known)]
    assert "Step: " in describe(plans[0])
    assert plans[0].parameters == plans[1].parameters
    memory = [plan.partition.worst_memory.memory.total for plan in plans]
    assert memory[0] == memory[1]
    costs = [plan.partition.costs.block for plan in plans]
    assert costs[0].forward.flops == costs[1].forward.flops
    assert costs[0].forward.kernels == costs[1].forward.kernels + 2
    moved = [cost.forward.other_bytes for cost in costs]
    assert moved[0] - moved[1] == 2 * 2 * 4 * 64 * 2 * 32  # read and written, fp32
    assert typical_rows(config.model)[0].branch_factor == 0.5
    flops = [training_flops_per_token(one.model, 32, 512) for one in (config, known)]
    assert flops[0] == flops[1]


def halved_by_hand() -> tuple[float, float, float]:
    """Losses of the new rule, of pre-norm, and of pre-norm with its output weights halved."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    losses = []
    with added_rules():
        for rule, scale in ((HALF, 1.0), ("pre_ln", 1.0), ("pre_ln", 0.5)):
            config = RunConfig.model_validate(settings(model__residual=rule, model__init_std=0.2))
            with start(config.parallel, config.training) as runtime:
                (chunk,) = build_model(config, runtime)
                with torch.no_grad():
                    for layer in chunk.decoder.layers:
                        layer.self_attention.linear_proj.weight.mul_(scale)
                        layer.mlp.linear_fc2.weight.mul_(scale)
                batch = made_up_batches(config, runtime, 0)[0]
                loss = chunk(batch.tokens, batch.position_ids, None, labels=batch.labels).mean()
                losses.append(loss.item())
    return losses[0], losses[1], losses[2]


def test_the_factor_of_the_branch_is_applied() -> None:
    """0.5 F is F with half its last product's weight."""
    (found,) = run_ranks(1, halved_by_hand)
    half, plain, by_hand = found
    assert half == pytest.approx(by_hand, rel=1e-6)
    assert abs(half - plain) > 1e-3
