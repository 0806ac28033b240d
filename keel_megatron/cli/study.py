"""`keel study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel_megatron.cli.arguments import writing
from keel_megatron.cli.studies.alpha import alpha
from keel_megatron.cli.studies.deep_versus_wide import deep_versus_wide
from keel_megatron.cli.studies.depth_scaling import depth_scaling
from keel_megatron.cli.studies.depth_tasks import depth_tasks
from keel_megatron.cli.studies.grid import add_study
from keel_megatron.cli.studies.max_learning_rate import max_learning_rate

app = typer.Typer(help="Reproduce the paper's studies.", no_args_is_help=True)


add_study(app, "alpha", alpha)
add_study(app, "max-learning-rate", max_learning_rate)
add_study(app, "depth-scaling", depth_scaling)
add_study(app, "deep-versus-wide", deep_versus_wide)
add_study(app, "depth-tasks", depth_tasks)


@app.callback()
def _group() -> None:
    """Reproduce the paper's studies."""


@app.command("gradient-flow")
def gradient_flow(
    sub_layers: Annotated[
        list[int] | None,
        typer.Option(
            min=4, help="Number of sub-layers L, even. Repeatable. Default: 64, 256, 1024."
        ),
    ] = None,
    residual: Annotated[
        list[str] | None,
        typer.Option(help="Residual rule. Repeatable. Default: keel, post_ln, deepnorm."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for gradient_flow.png and .json.")] = Path("."),
) -> None:
    """Measure Jacobian products along the skip path at initialization, and the paper's bounds."""
    with writing("--out", out):
        out.mkdir(parents=True, exist_ok=True)
    from keel_megatron.studies import flow_report
    from keel_megatron.studies import gradient_flow as study

    depths, rules = sub_layers or [64, 256, 1024], residual or ["keel", "post_ln", "deepnorm"]
    flows = [study.gradient_flow(rule, depth) for depth in depths for rule in rules]
    print(flow_report.flow_table(flows))
    with writing("--out", out):
        flow_report.save_flows(flows, out / "gradient_flow.json")
        flow_report.plot_flows(flows, out / "gradient_flow.png")
    print(f"{out / 'gradient_flow.png'}, {out / 'gradient_flow.json'}")
