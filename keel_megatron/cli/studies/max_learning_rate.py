"""`keel study max-learning-rate`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.choices import listed
from keel_megatron.cli.studies.grid import numbers
from keel_megatron.config.run import RunConfig
from keel_megatron.studies import max_learning_rate as rate_study
from keel_megatron.studies.grid import Axes, Study


def max_learning_rate(
    config: RunConfig,
    axes: Axes,
    ceiling: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE,...",
            help="Learning rates at the last step of the ramp. Default: 5e-2, the paper's.",
        ),
    ] = None,
) -> Study:
    """Raise the learning rate over the whole run, and find where each rule diverges (Table 1)."""
    ceilings = numbers("--ceiling", listed(ceiling)) or (rate_study.CEILING,)
    return rate_study.study(config, axes, ceilings)
