"""`keel study stream-precision`."""

from __future__ import annotations

from typing import Annotated

import typer

from keel_megatron.cli.choices import listed, some_of
from keel_megatron.config.run import RunConfig
from keel_megatron.studies import stream_precision as stream_study
from keel_megatron.studies.grid import Axes, Study


def stream_precision(
    config: RunConfig,
    axes: Axes,
    streams: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STREAM,...",
            help=f"Values of model.stream, of {', '.join(stream_study.STREAMS)}. Default: all; "
            "fp32 is always among them.",
            **some_of(lambda: stream_study.STREAMS),
        ),
    ] = None,
    alphas: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ALPHA,...",
            help=f"Values of model.alpha. Default: {','.join(stream_study.ALPHAS)}.",
        ),
    ] = None,
) -> Study:
    """Measure the cost of a residual stream in bf16, and Keel's advantage over Pre-LN."""
    return stream_study.study(
        config,
        axes,
        listed(streams) or stream_study.STREAMS,
        listed(alphas) or stream_study.ALPHAS,
    )
