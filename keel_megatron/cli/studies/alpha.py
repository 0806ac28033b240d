"""`keel study alpha`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.choices import listed, some_of
from keel_megatron.config.run import RunConfig
from keel_megatron.studies import alpha as alpha_study
from keel_megatron.studies.grid import Axes, Study


def alpha(
    config: RunConfig,
    axes: Axes,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCALE,...",
            help=f"Alphas, of {', '.join(alpha_study.SCALES)}. Default: all of them.",
            **some_of(lambda: alpha_study.SCALES),
        ),
    ] = None,
) -> Study:
    """Sweep alpha, the scale of the skip path; first_block v1 and v2, final_norm on and off."""
    return alpha_study.study(config, axes, listed(scale) or alpha_study.SCALES)
