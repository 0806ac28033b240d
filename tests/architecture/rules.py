"""A residual rule that is in the table while a test lasts, and a column that no code knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from keel_megatron.architecture.residual import RULES, Model, Rule, SubLayer

HALF, GATED = "half_branch", "gated"


@dataclass(frozen=True)
class Gated(SubLayer):
    """A sub-layer with a column of which no code has heard."""

    gate: float = 0.0


def half_branch(_l: int, _model: Model) -> SubLayer:
    """x_{l+1} = x_l + 0.5 F_l(N_in(x_l))."""
    return SubLayer(branch_factor=0.5, inner="norm")


def gated(_l: int, _model: Model) -> SubLayer:
    return Gated(inner="norm", gate=0.5)


@contextmanager
def added_rules() -> Iterator[None]:
    """The two rules, as a new row of the table would be."""
    added = {HALF: Rule(half_branch), GATED: Rule(gated)}
    RULES.update(added)
    try:
        yield
    finally:
        for name in added:
            del RULES[name]
