"""`keel study optimizers`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.choices import listed, some_of
from keel_megatron.cli.studies.grid import numbers
from keel_megatron.config.run import RunConfig
from keel_megatron.studies import optimizers as optimizer_study
from keel_megatron.studies.best_rate import RATES
from keel_megatron.studies.grid import Axes, Study


def optimizers(
    config: RunConfig,
    axes: Axes,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--optimizers",
            metavar="NAME,...",
            help=f"Of {', '.join(optimizer_study.OPTIMIZERS)}. Default: all.",
            **some_of(lambda: optimizer_study.OPTIMIZERS),
        ),
    ] = None,
    rates: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE,...",
            help=f"Learning rates to sweep. Default: {', '.join(f'{rate:g}' for rate in RATES)}.",
        ),
    ] = None,
) -> Study:
    """Compare Muon and AdamW at each one's best learning rate, and how the weights grow."""
    swept = numbers("--rates", listed(rates)) or RATES
    chosen = listed(names) or optimizer_study.OPTIMIZERS
    return optimizer_study.study(config, axes, swept, chosen)
