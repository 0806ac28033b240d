"""The pictures' style."""

from __future__ import annotations

from keel_megatron.architecture.residual import RULES
from keel_megatron.studies.pictures import rule_colour


def test_every_rule_has_its_own_colour() -> None:
    assert len({rule_colour(rule) for rule in RULES}) == len(RULES)
