"""Train Keel and Post-LN at 256 sub-layers, and plot three quantities over depth and steps.

python tools/depth_comparison.py            # docs/images/depth_keel_post_ln.png; 2 processes
python tools/depth_comparison.py --runs DIR # keep the runs there; complete ones are only plotted

Both are the demo (yaml/demo.yaml: hidden size 64, Python's standard library) with twice the blocks,
shorter sequences, a constant learning rate after the warm-up, and a profile of every step. It takes
a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from keel_megatron.depth.pictures import colours, draw_heat_map, stacked
from keel_megatron.depth.profile import QUANTITIES, DepthProfile, Values, read_profiles
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.tracking.style import QUIET, TEXT, save

Found = dict[str, list[DepthProfile]]
"""The profiles of every rule's run."""

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "depth_keel_post_ln.png"
RULES = {"keel": "Keel", "post_ln": "Post-LN"}
TITLES = {
    "gradient_norm": "Gradient norm",
    "update_to_weight": "Size of an update / weights",
    "update_size": "Size of a branch / skip path",
}
SETTINGS = (
    "model.blocks=128",
    "data.seq_length=64",
    "optimizer.name=adamw",
    "optimizer.learning_rate=5e-3",
    "schedule.warmup_steps=10",
    "schedule.decay=constant",
    "training.steps=48",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "training.validate_every=0",
    "training.validation_sequences=8",
    "checkpoint.every=0",
    "tracking.depth_every=1",
    "tracking.mlflow=false",
    "tracking.sample_prompt=null",
)


def train(runs: Path, rule: str, more: list[str]) -> Path:
    """Train a rule's run, or find that it is done."""
    command = [sys.executable, "-m", "keel_megatron", "train", str(ROOT / "yaml" / "demo.yaml")]
    own = [f"model.residual={rule}", f"training.name={rule}", f"training.runs_dir={runs}"]
    subprocess.run([*command, "--processes", "2", *SETTINGS, *own, *more], check=True)
    return runs / rule


def draw(found: Found, losses: dict[str, list[float]], out: Path) -> None:
    """A column a quantity, Keel above Post-LN, in the same colours."""
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 0.85), w_pad=0.1, h_pad=0.06, wspace=0.03)
    figure = Figure(figsize=(13.2, 8.2), dpi=130, facecolor="white", layout=layout)
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for column, (quantity, title) in zip(panels.T, TITLES.items(), strict=True):
        norm = colours(QUANTITIES[quantity], *(stacked(p, quantity) for p in found.values()))
        for axes, (rule, profiles) in zip(column, found.items(), strict=True):
            draw_heat_map(axes, profiles, quantity, norm, colour_bar=False)
            begin, end = losses[rule][0], losses[rule][-1]
            axes.set_title("")
            axes.set_title(f"loss {begin:.2f} to {end:.2f}", loc="right", fontsize=9, color=QUIET)
            axes.set_title(RULES[rule], loc="left", fontsize=11.5, fontweight="bold", color=TEXT)
            axes.set_ylabel("sub-layer" if quantity == "gradient_norm" else "", color=TEXT)
            axes.tick_params(length=2)
        column[0].set_xlabel("")
        above(column[0], title, 42, fontsize=12.5, fontweight="bold", color=TEXT)
        above(column[0], at_the_end(found, quantity), 26, fontsize=9.5, color=QUIET)
        bar = figure.colorbar(
            ScalarMappable(norm, "viridis"), ax=column, location="bottom", aspect=40, pad=0.02
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(color=QUIET, labelcolor=TEXT, labelsize=9)
    last = found["post_ln"][-1]
    title = (
        f"{last.sub_layers} sub-layers, {last.step} steps: Keel's gradient reaches every depth, "
        "Post-LN's vanishes"
    )
    figure.text(0.011, 0.985, title, fontsize=16, fontweight="bold", color=TEXT, va="top")
    remark = (
        "The same model, text, learning rate and steps, the same colours: only the rule by which a "
        "branch joins the stream differs."
    )
    figure.text(0.011, 0.942, remark, fontsize=10.5, color=QUIET, va="top")
    save(figure, out)


def above(axes: Axes, text: str, points: float, **style: Any) -> None:
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    note = axes.annotate(text, (0, 1), xytext=(0, points), **place, **style)
    note.set_in_layout(False)  # or a long one would make the panel narrow


def at_the_end(found: Found, quantity: str) -> str:
    """What the last column of the heat maps shows, in a number for each rule."""
    name, measure = MEASURES[quantity]
    figures = [
        f"{RULES[rule]} {power_of_ten(measure(profiles[-1].values[quantity]))}"
        for rule, profiles in found.items()
    ]
    return f"at the end, {name}: {', '.join(figures)}"


def median(values: Values) -> float:
    return float(np.ma.median(values.astype(np.float64)))


def first_by_last(values: Values) -> float:
    """The median of the first tenth of the sub-layers by that of the last tenth."""
    tenth = max(1, len(values) // 10)
    return median(values[:tenth]) / median(values[-tenth:])


def power_of_ten(value: float) -> str:
    """Such as 0.68 or 4 x 10^-11."""
    if 0.01 <= value < 100:
        return f"{value:.2g}"
    digit, exponent = f"{value:.0e}".split("e")
    return rf"${digit} \times 10^{{{int(exponent)}}}$"


MEASURES = {
    "gradient_norm": ("first / last tenth", first_by_last),
    "update_to_weight": ("median", median),
    "update_size": ("median", median),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of the two runs; a temporary one if none")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("settings", nargs="*", help="settings of both runs, section.key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary)
        folders = {rule: train(runs, rule, arguments.settings) for rule in RULES}
        found = {rule: read_profiles(folder) for rule, folder in folders.items()}
        losses = {
            rule: [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
            for rule, folder in folders.items()
        }
        draw(found, losses, arguments.out)
    for rule, profiles in found.items():
        for profile in (profiles[0], profiles[-1]):
            loss = losses[rule][profile.step - 1]
            print(f"{rule}, step {profile.step}: loss {loss:.3f}")
            for quantity, (name, measure) in MEASURES.items():
                print(f"  {quantity}, {name}: {measure(profile.values[quantity]):.2e}")
    print(arguments.out)


if __name__ == "__main__":
    main()
