"""A row of the table is all that a new residual rule needs: the rest of the program asks for it.

The rule is in a module of its own that exists for this test alone, as a user's would be.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import yaml
from keel_megatron.architecture.flops import training_flops_per_token
from keel_megatron.architecture.parameters import parameter_count
from keel_megatron.architecture.residual import RULES
from keel_megatron.cli.main import app
from keel_megatron.config.load import load_config
from keel_megatron.config.schema import json_schema
from tests.distributed import run_ranks
from tests.settings import settings
from tests.training.ranks import made_up_batches, train_steps

NAME = "gentle"
MODULE = '''
from keel_megatron.architecture.residual import RULES, Rule, SubLayer, alpha


def gentle(l, model):
    """Every column at once: two kinds of G, every norm, scaled skip, branch and input."""
    if l % 2 == 0:
        return SubLayer(
            alpha=alpha(model),
            branch_factor=0.5,
            inner="vector",
            inner_factor=0.7,
            head_norms="qkv",
        )
    return SubLayer(
        alpha=alpha(model),
        branch_norm=True,
        inner="norm",
        inner_factor=1 / (l + 1),
        outer_norm=True,
    )


RULES["gentle"] = Rule(gentle, settings=("alpha",), alpha_exponent=0.5, branch_init_exponent=-0.5)
'''
MODEL = {"model__residual": NAME, "model__blocks": 3}


@contextmanager
def added(path: Path) -> Iterator[None]:
    """Import the module that adds the rule; take the rule out of the table again."""
    spec = importlib.util.spec_from_file_location("new_rule", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    try:
        yield
    finally:
        del RULES[NAME]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rule") / "new_rule.py"
    path.write_text(MODULE)
    return path


@pytest.fixture(scope="module")
def found(module: Path) -> dict[str, Any]:
    (found,) = run_ranks(1, trained, module)
    return found


def trained(path: Path) -> dict[str, Any]:
    """Steps of the rule plain and compiled, one backward pass's gradients, and its parameters."""
    from keel_megatron.config.run import RunConfig
    from keel_megatron.model import compiled
    from keel_megatron.model.language_model import build_model
    from keel_megatron.runtime.distributed import start

    found: dict[str, Any] = {"steps": [], "gradients": []}
    with added(path), pytest.MonkeyPatch.context() as patch:
        # The graph and its backward pass as torch traces them; generating code is another matter.
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        for way in (False, True):
            sections = settings(**MODEL, kernels__compile=way)
            found["steps"].append(train_steps(sections, 3))
            config = RunConfig.model_validate(sections)
            with start(config.parallel, config.training) as runtime:
                (chunk,) = build_model(config, runtime)
                found["parameters"] = {n: p.detach().clone() for n, p in chunk.named_parameters()}
                if way:
                    compiled.compile_blocks([chunk], runtime.device)
                batch = made_up_batches(config, runtime, 0)[0]
                chunk(batch.tokens, batch.position_ids, None, labels=batch.labels).mean().backward()
                found["gradients"].append({n: p.grad for n, p in chunk.named_parameters()})
                if way:
                    layers: Any = chunk.decoder.layers  # type: ignore[union-attr]
                    found["compiled"] = [layer.compiled is not None for layer in layers]
                    found["graphs"] = len(layers[0].compiled._compiler.graphs)
        found["counted"] = parameter_count(config.model, config.data.vocab_size)
    return found


def test_a_new_rule_trains_the_same_plain_and_compiled(found: dict[str, Any]) -> None:
    assert found["compiled"] == [True] * 3
    assert found["graphs"] == 2, "the last block, and all others, whatever their factors are"
    plain, compiled = found["steps"]
    assert plain[-1] < plain[0], "it learns"
    for step, same in zip(plain, compiled, strict=True):
        assert same == pytest.approx(step, rel=1e-5)
    by_eye, by_graph = found["gradients"]
    for name, gradient in by_eye.items():
        assert (by_graph[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert found["counted"] == sum(weight.numel() for weight in found["parameters"].values())


def test_a_new_rules_initial_weights_are_the_tables(found: dict[str, Any]) -> None:
    """L^-0.5 times init_std = 0.02 for output and FFN weights; 1 for its learned vectors."""
    weights = found["parameters"]
    for name in ("self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        weight = weights[f"decoder.layers.1.{name}.weight"]
        assert weight.std().item() == pytest.approx(0.02 * 6**-0.5, rel=0.05)
    assert (weights["decoder.layers.1.input_layernorm.weight"] == 1).all()


def test_a_new_rule_is_configured_and_planned(module: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(**MODEL)))
    arguments = ["plan", str(path), "--gpu", "h200"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code != 0, "without the row there is no such rule"
    with added(module):
        assert NAME in json_schema()["$defs"]["ModelConfig"]["properties"]["residual"]["enum"]
        config = load_config(path, ("model.alpha=3",))
        shown = CliRunner().invoke(app, arguments)
        planned = CliRunner().invoke(app, [*arguments, "--json"])
        assert (shown.exit_code, planned.exit_code) == (0, 0), shown.output
        assert "Step: " in shown.output
        plan = json.loads(planned.stdout)
        assert plan["parameters"] == parameter_count(config.model, config.data.vocab_size)
        flops = training_flops_per_token(config.model, 32, config.data.vocab_size)
        known = config.model.model_copy(update={"residual": "pre_ln"})
        assert flops == training_flops_per_token(known, 32, config.data.vocab_size)
    with pytest.raises(Exception, match="must be one of keel"):
        load_config(path)
