"""Rate, decay and epsilon of every parameter, in both engines, against AdamW's equation."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from keel_megatron.engines.parameter_groups import ParameterGroup, block_of, parameter_group
from keel_megatron.model.initialization import global_parameters
from keel_megatron.model.language_model import build_model
from keel_megatron.runtime.device import Launch
from keel_megatron.runtime.distributed import start
from tests.distributed import run_ranks
from tests.engines.update_ranks import Update, first_updates
from tests.settings import settings, small_config

RATE, DECAY, EPSILON = 1e-2, 0.5, 1e-3
RATES = {"matrices": 0.5, "embeddings": 2.0, "head": 0.25, "norms": 4.0}
DEPTH = [{"blocks": [0, 0], "factor": 3.0}, {"blocks": [2, 3], "factor": 0.0}]
GROUPED: dict[str, Any] = {
    "model__blocks": 4,
    "optimizer__learning_rate": RATE,
    "optimizer__weight_decay": DECAY,
    "optimizer__epsilon": EPSILON,
    "optimizer__clip_grad": 0.0,
    "optimizer__rates": RATES,
    "optimizer__depth_rates": DEPTH,
    "training__global_batch_size": 2,
}
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
QKV = "decoder.layers.{}.self_attention.linear_qkv.weight"
NORM = "decoder.layers.{}.input_layernorm.weight"
# Name: factor of the rate and of the decay, worked out by hand.
FACTORS = {
    EMBEDDING: (2.0, 1.0),
    HEAD: (0.25, 1.0),
    "decoder.final_layernorm.weight": (4.0, 0.0),
    QKV.format(0): (1.5, 1.0),
    QKV.format(1): (0.5, 1.0),
    QKV.format(2): (0.0, 1.0),
    NORM.format(0): (12.0, 0.0),
    NORM.format(1): (4.0, 0.0),
    NORM.format(3): (0.0, 0.0),
}
ENGINES: dict[str, dict[str, Any]] = {
    "megatron": {},
    "megatron, replicated": {"parallel__distributed_optimizer": False},
}
if importlib.util.find_spec("deepspeed") is not None:
    for stage in (1, 3):
        zero = {"training__engine": "deepspeed", "deepspeed__zero_stage": stage}
        ENGINES[f"ZeRO {stage}"] = zero


# CompleteP of 2 blocks at 4: the blocks' epsilon is halved, nothing else changes.
COMPLETE_P = {"model__residual": "complete_p", "model__base_blocks": 2}
COMPLETE_P |= {"optimizer__rates": {}, "optimizer__depth_rates": []}


@pytest.fixture(scope="module")
def updates() -> dict[str, list[dict[str, Update]]]:
    """The first update of every engine: with the factors, and of CompleteP without."""
    runs = [
        settings(**{**GROUPED, **engine, **rule})
        for engine in ENGINES.values()
        for rule in ({}, COMPLETE_P)
    ]
    (found,) = run_ranks(1, first_updates, runs, RATE)
    return {engine: found[2 * i : 2 * i + 2] for i, engine in enumerate(ENGINES)}


def assert_adamw(update: Update, rate: float, decay: float, epsilon: float, told: str) -> None:
    """In AdamW's first step the moments, corrected, are the gradient and its square."""
    before, gradient, after = update
    assert gradient.abs().max() > 0
    step = RATE * rate * gradient / (gradient.abs() + EPSILON * epsilon)
    expected = before * (1.0 - RATE * rate * DECAY * decay) - step
    # Of weights about 1 in fp32.
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=2e-7, msg=told)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_is_adamws_with_the_parameters_own_factors(
    engine: str, updates: dict[str, list[dict[str, Update]]]
) -> None:
    for name, (rate, decay) in FACTORS.items():
        assert_adamw(updates[engine][0][name], rate, decay, 1.0, f"{engine}: {name}")


@pytest.mark.parametrize("engine", ENGINES)
def test_complete_p_has_a_smaller_epsilon_in_its_blocks(
    engine: str, updates: dict[str, list[dict[str, Update]]]
) -> None:
    found = updates[engine][1]
    for name in FACTORS:
        if name in found:
            decay, epsilon = float("norm" not in name), 0.5 if ".layers." in name else 1.0
            assert_adamw(found[name], 1.0, decay, epsilon, f"{engine}: {name}")


def test_without_settings_there_are_matrices_and_vectors_that_do_not_decay() -> None:
    config = small_config()
    for name in (EMBEDDING, HEAD, QKV.format(3)):
        assert parameter_group(name, 2, config) == ParameterGroup()
    assert parameter_group(NORM.format(3), 1, config) == ParameterGroup(decay=0.0)
    decayed = small_config(optimizer__decay_norms=True)
    assert parameter_group(NORM.format(3), 1, decayed) == ParameterGroup()


def test_mixes_of_streams_never_decay() -> None:
    """Decay would take the identity of every sub-layer's skip path to 0."""
    config = small_config(model__residual="hyper_connections", optimizer__decay_norms=True)
    mixes = ("attention_streams", "mlp_streams")
    with start(config.parallel, config.training, Launch(0, 1, 0, 1)) as runtime:
        (chunk,) = build_model(config, runtime)
        names = [name for name, _parameter in global_parameters(chunk, tied=False)]
    found = {name for name in names if parameter_group(name, 1, config).decay == 0.0}
    assert found == {f"decoder.layers.{n}.{mix}.weight" for n in range(8) for mix in mixes}


def test_a_block_is_found_by_its_number_in_the_whole_model() -> None:
    assert block_of("decoder.layers.127.mlp.linear_fc1.weight") == 127
    assert block_of("decoder.final_layernorm.weight") is None
    assert block_of(EMBEDDING) is None
