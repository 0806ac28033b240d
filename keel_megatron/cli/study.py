"""`keel study`."""

from __future__ import annotations

from keel_megatron.cli.help import App
from keel_megatron.cli.studies.alpha import alpha
from keel_megatron.cli.studies.coordinate_check import coordinate_check
from keel_megatron.cli.studies.deep_versus_wide import deep_versus_wide
from keel_megatron.cli.studies.depth_scaling import depth_scaling
from keel_megatron.cli.studies.depth_tasks import depth_tasks
from keel_megatron.cli.studies.gradient_flow import gradient_flow
from keel_megatron.cli.studies.grid import add_study
from keel_megatron.cli.studies.max_learning_rate import max_learning_rate
from keel_megatron.cli.studies.optimizers import optimizers
from keel_megatron.cli.studies.redundancy import redundancy
from keel_megatron.cli.studies.stream_precision import stream_precision

app = App(help="Reproduce the paper's studies.")


add_study(app, "alpha", alpha)
add_study(app, "max-learning-rate", max_learning_rate)
add_study(app, "depth-scaling", depth_scaling)
add_study(app, "deep-versus-wide", deep_versus_wide)
add_study(app, "optimizers", optimizers)
add_study(app, "depth-tasks", depth_tasks)
app.command("gradient-flow")(gradient_flow)
app.command("redundancy")(redundancy)
add_study(app, "stream-precision", stream_precision)
add_study(app, "coordinate-check", coordinate_check)


@app.callback()
def _group() -> None:
    """Reproduce the paper's studies."""
