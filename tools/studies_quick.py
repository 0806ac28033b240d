"""Every study at a tiny size, to see that all of them work: minutes on a CPU, no result.

    python tools/studies_quick.py [OUT]

OUT is runs/studies-quick by default. What is there already is not repeated.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from keel_megatron.config.load import load_config
from keel_megatron.studies import alpha
from keel_megatron.studies.grid import Axes, make_grid

ROOT = Path(__file__).resolve().parents[1]


def commands(out: Path) -> dict[str, list[str]]:
    """The arguments of `keel study` by study, in the order in which they run.

    Args:
        out: folder of the studies' folders, absolute.
    """
    text = f"data.text={ROOT}/keel_megatron/config/*.py"
    config = str(ROOT / "yaml" / "studies" / "quick.yaml")

    def grid(name: str, *options: str) -> list[str]:
        place = ["--out", str(out / name), "--parallel", "2", "--no-measure"]
        return [name, config, f"data.cache_dir={out / 'data'}", *place, *options]

    return {
        "alpha": grid("alpha", text, "--scale", "L"),
        "max-learning-rate": grid("max-learning-rate", text, "--rules", "keel,pre_ln"),
        "depth-scaling": grid("depth-scaling", text, "--rules", "keel", "--rates", "1e-3,1e-2"),
        "deep-versus-wide": grid(
            "deep-versus-wide", text, "--rules", "keel", "--depths", "4,8", "--rates", "1e-3"
        ),
        "depth-tasks": grid(
            *("depth-tasks", "data.seq_length=64", "--tasks", "hops"),
            *("--rules", "keel", "--largest", "2", "--documents", "2000"),
        ),
        "stream-precision": grid(
            *("stream-precision", text, "--rules", "keel"),
            *("--streams", "bf16_stochastic", "--alphas", "auto"),
        ),
        "gradient-flow": [
            *("gradient-flow", "--depths", "8", "--rules", "keel,post_ln"),
            *("--out", str(out / "gradient-flow")),
        ],
        "redundancy": [
            *(
                "redundancy",
                _alpha_run(Path(config), (f"data.cache_dir={out / 'data'}", text), out),
            ),
            *("--out", str(out / "redundancy")),
        ],
    }


def _alpha_run(config: Path, overrides: tuple[str, ...], out: Path) -> str:
    """The folder of the first run of the study of alpha."""
    axes = Axes((), (load_config(config, overrides).model.sub_layers,))
    study = alpha.study(load_config(config, overrides), axes, ("L",))
    return str(make_grid(study, config, overrides, out / "alpha").runs[0].folder)


def main() -> int:
    """Run all studies; the number that failed."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "studies-quick").absolute()
    failed = []
    for name, arguments in commands(out).items():
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "keel_megatron", "study", *arguments]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    print(f"{len(commands(out)) - len(failed)} studies work; results: {out}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
