"""Every study at a tiny size, to see that all of them work: minutes on a CPU, no result.

    python tools/studies_quick.py [OUT]

OUT is runs/studies-quick by default. What is there already is not repeated.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands(out: Path) -> Iterator[list[str]]:
    """The arguments of `keel study`, one study after the other; the last measures a trained run.

    Args:
        out: folder of the studies' folders, absolute.
    """
    text = f"data.text={ROOT}/keel_megatron/config/*.py"
    config = str(ROOT / "yaml" / "studies" / "quick.yaml")

    def grid(name: str, *options: str) -> list[str]:
        place = ["--out", str(out / name), "--parallel", "2", "--no-measure"]
        return [name, config, f"data.cache_dir={out / 'data'}", *place, *options]

    yield grid("alpha", text, "--scale", "L")
    yield grid("max-learning-rate", text, "--rules", "keel,pre_ln")
    yield grid("depth-scaling", text, "--rules", "keel", "--rates", "1e-3,1e-2")
    shapes = ("--depths", "4,8", "--rates", "1e-3")
    yield grid("deep-versus-wide", text, "--rules", "keel", *shapes)
    yield grid("optimizers", text, "--rules", "keel", "--rates", "1e-3")
    tasks = ("--tasks", "hops", "--largest", "2", "--documents", "2000", "--questions", "10")
    yield grid("depth-tasks", "data.seq_length=64", "--rules", "keel", *tasks)
    streams = ("--streams", "bf16_stochastic", "--alphas", "auto")
    yield grid("stream-precision", text, "--rules", "keel", *streams)
    sizes = ("--rules", "complete_p", "--depths", "4,8", "--steps", "2")
    yield grid("coordinate-check", text, *sizes)
    place = ["--out", str(out / "gradient-flow")]
    yield ["gradient-flow", *place, "--depths", "8", "--rules", "keel,post_ln"]
    run = min(path.parent for path in out.glob("alpha/*/config.yaml"))
    yield ["redundancy", str(run), "--out", str(out / "redundancy"), "--tokens", "32"]


def main() -> int:
    """Run all studies; the number that failed."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "studies-quick").absolute()
    done, failed = [], []
    for arguments in commands(out):
        print(f"== {arguments[0]}", flush=True)
        command = [sys.executable, "-m", "keel_megatron", "study", *arguments]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        (failed if code else done).append(arguments[0])
    print(f"{len(done)} studies work; results: {out}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
