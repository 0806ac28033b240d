"""`keel study coordinate-check`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.choices import listed
from keel_megatron.config.run import RunConfig
from keel_megatron.studies import coordinate_check as check_study
from keel_megatron.studies.grid import Axes, Study


def coordinate_check(
    config: RunConfig,
    axes: Axes,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of each run, at optimizer.learning_rate.")
    ] = check_study.STEPS,
    epsilons: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FACTOR,...",
            help="Factors of optimizer.epsilon, such as 1, 100 or 1/L (L: sub-layers). With "
            "several, the table of sizes shows the first, and the picture shows their effect. "
            "Default: 1.",
        ),
    ] = None,
) -> Study:
    """Measure activations, gradients and updates over depth in the first steps, for every rule."""
    return check_study.study(config, axes, steps, listed(epsilons) or ("1",))
