"""`keel study gradient-flow`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.architecture.residual import RULES
from keel_megatron.cli.arguments import Json, only_json, writing
from keel_megatron.cli.choices import listed, some_of
from keel_megatron.cli.studies.grid import FOLDER, print_results, whole_numbers

DEPTHS, DEFAULT_RULES = (64, 256, 1024), ("keel", "post_ln", "deepnorm")


def gradient_flow(
    rules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE,...",
            help=f"Residual rules. Default: {','.join(DEFAULT_RULES)}.",
            **some_of(lambda: RULES),
        ),
    ] = None,
    depths: Annotated[
        list[str] | None,
        typer.Option(
            metavar="L,...",
            help=f"Numbers of sub-layers, even. Default: {','.join(map(str, DEPTHS))}.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results.json, table.md and picture.png.")
    ] = FOLDER / "gradient-flow",
    as_json: Json = False,
) -> None:
    """Measure Jacobian products along the skip path at initialization, and the paper's bounds."""
    sizes = whole_numbers("--depths", listed(depths)) or DEPTHS
    with writing("--out", out):
        out.mkdir(parents=True, exist_ok=True)
    from keel_megatron.studies import flow_report
    from keel_megatron.studies import gradient_flow as study

    names = listed(rules) or DEFAULT_RULES
    flows = []
    for depth, rule in itertools.product(sizes, names):
        flows.append(study.gradient_flow(rule, depth))
        done = f"{len(flows)} of {len(sizes) * len(names)} models"
        print(f"{rule}, {depth} sub-layers: measured ({done})", file=sys.stderr, flush=True)
    with writing("--out", out), only_json(as_json):
        for line in flow_report.save_flows(flows, out):
            print(line)
    if as_json:
        print_results(out)
