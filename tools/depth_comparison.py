"""Train Keel and Post-LN alike at 256 sub-layers, and draw their gradients over the depth.

python tools/depth_comparison.py            # docs/images/depth_keel_post_ln.png; 2 processes
python tools/depth_comparison.py --runs DIR # keep the runs there; trained ones are drawn again

Both are the demo (yaml/demo.yaml: hidden size 64, Python's standard library) with twice the blocks,
shorter sequences and a profile of every step. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from keel_megatron.tracking.depth import QUANTITIES, DepthProfile, finite_values, read_profiles
from keel_megatron.tracking.depth_plot import colours, draw_heat_map, stacked
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.tracking.style import BLUE, ORANGE, QUIET, TEXT, dress, save

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "depth_keel_post_ln.png"
RULES = {"keel": ("Keel", BLUE), "post_ln": ("Post-LN", ORANGE)}
QUANTITY = "gradient_norm"
SETTINGS = (
    "model.blocks=128",
    "data.seq_length=64",
    "schedule.warmup_steps=10",
    "training.steps=48",
    "training.global_batch_size=8",
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


def draw(found: dict[str, list[DepthProfile]], losses: dict[str, list[float]], out: Path) -> None:
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 0.875), w_pad=0.08, h_pad=0.08, wspace=0.02)
    figure = Figure(figsize=(13.2, 4.9), dpi=140, facecolor="white", layout=layout)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.08))
    norm = colours(QUANTITIES[QUANTITY], *(stacked(p, QUANTITY) for p in found.values()))
    for axes, (rule, profiles) in zip((left, middle), found.items(), strict=True):
        draw_heat_map(axes, profiles, QUANTITY, norm, colour_bar=False)
        axes.set_title(RULES[rule][0], loc="left", fontsize=12, fontweight="bold", color=TEXT)
    middle.set_ylabel("")
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=[left, middle], pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(color=QUIET, labelcolor=TEXT, labelsize=9)
    bar.set_label("gradient norm of a sub-layer", color=TEXT)
    draw_over_depth(right, found, losses)
    last = found["post_ln"][-1]
    title = f"Gradients over {last.sub_layers} sub-layers: the same model, text and steps"
    figure.text(0.011, 0.975, title, fontsize=14.5, fontweight="bold", color=TEXT, va="top")
    figure.text(
        0.011,
        0.915,
        f"Both begin nearly alike. After {last.step} steps Keel's reaches every depth as before; "
        f"of the gradient in Post-LN's last block {vanished(last)} is left in its first.",
        fontsize=10.5,
        color=QUIET,
        va="top",
    )
    save(figure, out)


def draw_over_depth(
    axes: Any, found: dict[str, list[DepthProfile]], losses: dict[str, list[float]]
) -> None:
    for rule, profiles in found.items():
        name, colour = RULES[rule]
        for profile, style in (
            (profiles[0], {"linestyle": (0, (4, 2)), "linewidth": 1.1}),
            (profiles[-1], {"linewidth": 1.8}),
        ):
            whole = blocks(profile)
            loss = losses[rule][profile.step - 1]
            label = f"{name}, step {profile.step} (loss {loss:.2f})"
            axes.plot(2 * np.arange(len(whole)), whole, color=colour, label=label, **style)
    axes.set_yscale("log")
    axes.set_xlabel("sub-layer", color=TEXT)
    axes.set_title(
        "First and last step, a block each", loc="left", fontsize=12, fontweight="bold", color=TEXT
    )
    axes.legend(frameon=False, fontsize=9.5, labelcolor=TEXT, loc="center left")
    axes.set_xlim(0, profiles[0].sub_layers)
    dress(axes)


def blocks(profile: DepthProfile) -> np.ndarray[Any, Any]:
    """The gradient norm of every block: of attention and FFN together."""
    squares = profile.values[QUANTITY].filled(np.nan).astype(np.float64) ** 2
    return np.sqrt(squares.reshape(-1, 2).sum(1))


def vanished(profile: DepthProfile) -> str:
    """What is left of the last block's gradient in the first, such as 4 x 10^-11."""
    whole = blocks(profile)
    digit, exponent = f"{whole[0] / whole[-1]:.0e}".split("e")
    return rf"${digit} \times 10^{{{int(exponent)}}}$"


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
            whole = blocks(profile)
            finite = finite_values(profile.values[QUANTITY])
            print(
                f"{rule:8} step {profile.step:3}: first block {whole[0]:.2e}, "
                f"last {whole[-1]:.2e}, sub-layers {finite.min():.2e} to {finite.max():.2e}, "
                f"loss {losses[rule][profile.step - 1]:.3f}"
            )
    print(arguments.out)


if __name__ == "__main__":
    main()
