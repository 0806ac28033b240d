"""`keel study deep-versus-wide`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.choices import listed
from keel_megatron.cli.studies.grid import numbers
from keel_megatron.config.run import RunConfig
from keel_megatron.studies import deep_versus_wide as shape_study
from keel_megatron.studies.best_rate import RATES
from keel_megatron.studies.grid import Axes, Study


def deep_versus_wide(
    config: RunConfig,
    axes: Axes,
    rates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE,...",
            help=f"Learning rates to sweep. Default: {', '.join(f'{rate:g}' for rate in RATES)}.",
        ),
    ] = None,
) -> Study:
    """Compare shapes of equal parameters from wide to deep, at each one's best rate (Table 5).

    The parameters of the blocks are those of CONFIG within 1 %; --depths gives the shapes.
    """
    return shape_study.study(config, axes, numbers("--rates", listed(rates)) or RATES)
