"""Time this project beside its neighbours: same shape, tokens and threads, in turn, in one run.

python tools/bench/peers.py                  # install the peers, run every comparison, write both
python tools/bench/peers.py --shape deep     # one shape
python tools/bench/peers.py --peers keel,pre_ln,plain   # some contenders

Each peer is installed from PyPI into a virtual environment of its own under build/peers. Every
contender is a process (tools/bench/peer_worker.py) that waits while the others work: they step in
turn, round after round, so that whatever else the machine does meets all of them. The median step
counts; a ratio is that of medians. Writes docs/benchmarks/peers.md and peers.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from keel_megatron.runtime.cores import available_cores
from keel_megatron.runtime.machines import cpu_name

ENVIRONMENTS = ROOT / "build" / "peers"
RESULTS = ROOT / "docs" / "benchmarks"
TORCH = "torch==2.13.0"
PACKAGES = {
    "transformers": ["transformers==5.24.0"],
    "litgpt": ["litgpt==0.5.13"],
}
NOTES = {
    "pre_ln": "this project, Pre-LN",
    "keel": "this project, Keel",
    "pre_ln_compiled": "Pre-LN with `kernels.compile`",
    "keel_compiled": "Keel with `kernels.compile`",
    "plain": "the tests' plain PyTorch model of Keel",
    "transformers": "Llama in a plain torch loop",
    "litgpt": "its GPT in a plain torch loop",
}
SHAPES: dict[str, dict[str, int]] = {
    "wide": {
        "blocks": 16,
        "hidden_size": 256,
        "ffn_hidden_size": 768,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 2048,
        "seq_length": 256,
        "micro_batch_size": 4,
        "micro_batches": 2,
    },
    "deep": {
        "blocks": 512,
        "hidden_size": 64,
        "ffn_hidden_size": 192,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 512,
        "seq_length": 64,
        "micro_batch_size": 1,
        "micro_batches": 2,
    },
}


@dataclass
class Contender:
    """A waiting process."""

    name: str
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    loss: float = float("nan")
    peak_bytes: int = 0

    def ask(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended in the middle of a step")
        return json.loads(line)

    def take(self, steps: int) -> None:
        answer = self.ask(steps)
        self.seconds += answer["seconds"]
        self.loss, self.peak_bytes = answer["loss"], answer["peak_bytes"]


def interpreter(name: str, pip: list[str]) -> str:
    """The Python of a contender's environment, made if it is not there."""
    if name not in PACKAGES:
        return sys.executable
    folder = ENVIRONMENTS / name
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"installing {name} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # torch first and pinned: another package would bring CUDA builds along.
        for packages in ([TORCH, "numpy"], [TORCH, *PACKAGES[name]]):
            subprocess.run(
                [str(python), "-m", "pip", "install", "--quiet", *pip, *packages], check=True
            )
        done.touch()
    return str(python)


def version(python: str, name: str) -> str:
    package = PACKAGES.get(name, ["torch"])[0].partition("==")[0]
    code = f"from importlib.metadata import version; print(version({package!r}))"
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return f"{package} {out.stdout.strip()}"


def begin(name: str, python: str, shape: dict[str, int], threads: int) -> Contender | str:
    """Start a contender; if it cannot run here, its last word."""
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - for as long as the process lives
    process = subprocess.Popen(
        [
            python,
            str(Path(__file__).with_name("peer_worker.py")),
            name,
            json.dumps(shape | {"threads": threads}),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        process.wait()
        errors.seek(0)
        return (errors.read().strip().splitlines() or ["no word of why"])[-1]
    return Contender(name, process)


def compare(
    shape: dict[str, int], names: list[str], rounds: int, threads: int, pip: list[str]
) -> dict[str, Any]:
    """Every contender's seconds a step, memory and version; why the others are not there."""
    contenders, versions, absent = [], {}, {}
    try:
        for name in names:
            try:
                python = interpreter(name, pip)
            except subprocess.CalledProcessError as error:
                absent[name] = f"does not install: {error}"
                continue
            versions[name] = version(python, name)
            contender = begin(name, python, shape, threads)
            if isinstance(contender, str):
                absent[name] = f"{versions[name]} does not run: {contender}"
                print(f"{name} {absent[name]}", flush=True)
            else:
                contenders.append(contender)
                contender.ask(2)  # to warm up
        for number in range(rounds):
            for contender in contenders:
                contender.take(1)
            print(
                f"round {number + 1}/{rounds}: "
                + ", ".join(f"{c.name} {c.seconds[-1]:.2f} s" for c in contenders),
                flush=True,
            )
    finally:
        for contender in contenders:
            assert contender.process.stdin is not None
            contender.process.stdin.close()
            try:
                contender.process.wait(30)
            except subprocess.TimeoutExpired:
                contender.process.kill()
    found = {
        c.name: {
            "seconds": c.seconds,
            "median": statistics.median(c.seconds),
            "peak_bytes": c.peak_bytes,
            "loss": c.loss,
            "version": versions[c.name],
        }
        for c in contenders
    }
    return {"found": found, "absent": absent}


def table(shape: dict[str, int], found: dict[str, Any]) -> list[str]:
    """A Markdown table; times relative to this project's Pre-LN, or to the first contender."""
    tokens = shape["micro_batches"] * shape["micro_batch_size"] * shape["seq_length"]
    base = found["pre_ln"]["median"] if "pre_ln" in found else next(iter(found.values()))["median"]
    lines = [
        "| | tokens/s | step time | quartiles | ms per block and micro-batch | peak memory, MB | |",
        "|---|-:|-:|-:|-:|-:|---|",
    ]
    for name, one in found.items():
        low, _, high = statistics.quantiles(one["seconds"], n=4)
        unit = one["median"] / shape["blocks"] / shape["micro_batches"] * 1e3
        lines.append(
            f"| {name} | {tokens / one['median']:,.0f} | {one['median'] / base:.2f} | "
            f"{low / base:.2f} to {high / base:.2f} | {unit:.2f} | {one['peak_bytes'] / 1e6:.0f} | "
            f"{NOTES[name]} ({one['version']}) |"
        )
    return lines


def write(results: dict[str, Any]) -> None:
    """Both files, from everything measured so far."""
    lines = [
        "# Comparison with other projects, on a CPU",
        "",
        "One training step (forward, backward, clip, AdamW) of the same shape on the same tokens,",
        "fp32, all programs interleaved in one run: `make bench-peers`. Step times are relative to",
        "this project's Pre-LN; compare only these ratios, because the machine is shared. Peak",
        "memory is that of the process, including libraries. torchtitan 0.3.0 is not included: its",
        "language models have no attention that runs on a CPU (only flex and varlen).",
    ]
    for name, one in results.items():
        shape = one["shape"]
        lines += [
            "",
            f"## {2 * shape['blocks']} sub-layers, hidden {shape['hidden_size']}",
            "",
            f"FFN {shape['ffn_hidden_size']}, {shape['num_attention_heads']} heads, "
            f"{shape['num_query_groups']} key/value heads, vocabulary {shape['vocab_size']}, "
            f"sequence {shape['seq_length']}; {shape['micro_batches']} micro-batches of "
            f"{shape['micro_batch_size']}. {one['threads']} thread(s), {one['rounds']} rounds, "
            f"{one['machine']}, {one['date']}. `python tools/bench/peers.py --shape {name}`",
            "",
            *table(shape, one["found"]),
            *[line for name, why in one["absent"].items() for line in ("", f"{name}: {why}.")],
        ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "peers.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "peers.json").write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="one shape (default: all)")
    parser.add_argument("--peers", default=",".join(NOTES), help="contenders, comma-separated")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (default 9)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--pip-args", default="", help="extra arguments of every pip install")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.peers.split(",")]
    if unknown := [name for name in names if name not in NOTES]:
        parser.error(f"--peers: {', '.join(unknown)} not among {', '.join(NOTES)}")
    kept = RESULTS / "peers.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for shape in arguments.shape or list(SHAPES):
        measured = compare(
            SHAPES[shape],
            names,
            arguments.rounds,
            arguments.threads,
            arguments.pip_args.split(),
        )
        results[shape] = {
            "shape": SHAPES[shape],
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "machine": f"{available_cores()} cores of {cpu_name()}",
            "date": datetime.date.today().isoformat(),
        } | measured
        write(results)
        print("\n".join(table(SHAPES[shape], measured["found"])), flush=True)


if __name__ == "__main__":
    main()
