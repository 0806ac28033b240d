"""`keel study depth-scaling`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.choices import listed
from keel_megatron.cli.studies.grid import numbers
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.studies import depth_scaling as depth_study
from keel_megatron.studies.best_rate import RATES
from keel_megatron.studies.grid import Axes, Study


def depth_scaling(
    _config: RunConfig,
    axes: Axes,
    rates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE,...",
            help=f"Learning rates to sweep. Default: {', '.join(f'{rate:g}' for rate in RATES)}.",
        ),
    ] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE=RATE,...", help="Train a rule at this rate only."),
    ] = None,
) -> Study:
    """Compare rules over depth at fixed width, each at its own best learning rate (Table 3)."""
    given = {}
    for item in listed(rate):
        rule, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--rate: {item!r} must be RULE=RATE, as keel=3e-3")
        (given[rule],) = numbers("--rate", [value])
    return depth_study.study(axes, numbers("--rates", listed(rates)) or RATES, given)
