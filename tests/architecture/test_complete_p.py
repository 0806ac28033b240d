"""CompleteP against Table 1 of its paper (arXiv 2505.01618), at any width and depth."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from keel_megatron.architecture.residual import RULES, SubLayer, branch_init_scale
from keel_megatron.engines.parameter_groups import ParameterGroup, parameter_group
from tests.settings import small_config


@dataclass(frozen=True)
class Table1:
    """The paper's parameterization: m_N = N / N_base, m_L = L / L_base, alpha of the branch."""

    width: float
    depth: float
    alpha: float = 1.0

    @property
    def branch(self) -> float:
        """Multiplier of attention's and the MLP's output: m_L^-alpha."""
        return self.depth**-self.alpha

    @property
    def hidden_rate(self) -> float:
        """m_N^-1 m_L^(alpha - 1), of eta_base."""
        return self.width**-1 * self.depth ** (self.alpha - 1)

    @property
    def norm_rate(self) -> float:
        """Pre-LN: m_L^(alpha - 1)."""
        return self.depth ** (self.alpha - 1)

    @property
    def hidden_decay(self) -> float:
        """m_N, of lambda_base."""
        return self.width

    @property
    def hidden_variance(self) -> float:
        """m_N^-1, of sigma_base^2."""
        return self.width**-1

    @property
    def block_epsilon(self) -> float:
        """Residual blocks: m_N^-1 m_L^-alpha; embedding and head: m_N^-1."""
        return self.width**-1 * self.depth**-self.alpha

    @property
    def end_epsilon(self) -> float:
        return self.width**-1


@pytest.mark.parametrize(("blocks", "base"), [(2, 2), (8, 2), (3, 4), (128, 2), (64, 16)])
def test_the_rule_is_the_papers_table_at_the_base_models_width(blocks: int, base: int) -> None:
    paper = Table1(width=1.0, depth=blocks / base)
    settings = {"model__residual": "complete_p", "model__blocks": blocks}
    config = small_config(**settings, model__base_blocks=base)
    row = SubLayer(branch_factor=pytest.approx(paper.branch), inner="norm")
    rule = RULES["complete_p"]
    assert all(rule.sub_layer(l, config.model) == row for l in range(2 * blocks))
    assert branch_init_scale(config.model) ** 2 == paper.hidden_variance
    at = f"decoder.layers.{blocks - 1}."
    hidden = parameter_group(f"{at}mlp.linear_fc1.weight", 2, config)
    assert hidden == ParameterGroup(
        paper.hidden_rate, paper.hidden_decay, pytest.approx(paper.block_epsilon)
    )
    norm = parameter_group(f"{at}input_layernorm.weight", 1, config)
    assert norm == ParameterGroup(paper.norm_rate, 0.0, pytest.approx(paper.block_epsilon))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert parameter_group(name, 2, config) == ParameterGroup(epsilon=paper.end_epsilon)
    final = parameter_group("decoder.final_layernorm.weight", 1, config)
    assert final == ParameterGroup(decay=0.0, epsilon=paper.end_epsilon)


def test_only_complete_p_changes_epsilon_with_depth() -> None:
    for rule in RULES.keys() - {"complete_p"}:
        config = small_config(model__residual=rule, model__blocks=64)
        found = parameter_group("decoder.layers.63.mlp.linear_fc1.weight", 2, config)
        assert found == ParameterGroup(), rule
