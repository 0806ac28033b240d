"""Settings without effect are reported."""

from __future__ import annotations

from typing import Any

import pytest

from keel_megatron.config import RunConfig
from keel_megatron.config.unused import _USED_WITH, unused_settings
from tests.settings import small_config

MUON = {"optimizer__momentum": 0.5, "optimizer__ns_steps": 6}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, []),
        (
            MUON,
            ["optimizer.momentum, optimizer.ns_steps: no effect with optimizer.name: adamw"],
        ),
        ({**MUON, "optimizer__name": "muon"}, []),
        ({"optimizer__momentum": 0.95}, []),  # the default
        (
            {"schedule__decay_fraction": 0.5},
            ["schedule.decay_fraction: no effect with schedule.decay: cosine"],
        ),
        ({"schedule__decay_fraction": 0.5, "schedule__decay": "wsd"}, []),
        (
            {"schedule__min_learning_rate": 1e-4, "schedule__decay": "constant"},
            ["schedule.min_learning_rate: no effect with schedule.decay: constant"],
        ),
        ({"schedule__min_learning_rate": 1e-4, "schedule__decay": "wsd"}, []),
    ],
)
def test_they_are_named_with_the_setting_that_they_need(
    overrides: dict[str, Any], expected: list[str]
) -> None:
    assert list(unused_settings(small_config(**overrides))) == expected


def test_the_table_and_the_descriptions_agree() -> None:
    """The descriptions of these settings say where they apply, and those of no others."""
    told = {
        f"{section}.{name}"
        for section, of in RunConfig.model_fields.items()
        for name, field in of.annotation.model_fields.items()  # type: ignore[union-attr]
        if " only." in str(field.description).partition("Applies to")[2]
    }
    listed = {
        f"{path.partition('.')[0]}.{name}" for path, _values, names in _USED_WITH for name in names
    }
    assert told == listed
