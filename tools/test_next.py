"""Test this project with newer versions of megatron-core than the installed one.

python tools/test_next.py                 # the newest of 0.17, 0.18 and 0.19; make test-next
python tools/test_next.py 0.19 --only demo layouts

From 0.17 on, megatron-core requires Python 3.12, and its wheels are built for it. Their content is
valid Python 3.11, except for one compiled helper of its datasets. So the wheel for 3.12 is
downloaded and unpacked, the installed version's helper is copied into it under an older Python, and
the folder is put first on PYTHONPATH. Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "next"
SERIES = ("0.17", "0.18", "0.19")
DEMO_STEPS = 4
TESTS = ("-m", "not slow and not gpu", "-q", "-p", "no:cacheprovider")
PARTS = {
    "parity": ["-m", "pytest", *TESTS, "tests/model"],
    "layouts": ["-m", "pytest", *TESTS, "tests/training/test_layouts.py"],
    "checkpoints": ["-m", "pytest", *TESTS, "tests/checkpoint"],
    "demo": [],
}
"""What is run of a version, by name; the demo's losses must be those of the installed version."""


class NotThereError(Exception):
    """A version cannot be had; the message says why."""


@dataclass(frozen=True)
class Result:
    """How a part went on a version."""

    version: str
    part: str
    passed: bool
    seconds: float
    summary: str


def unpacked(series: str) -> Path:
    """The folder of the newest version of a series, downloaded if the cache has none.

    Raises:
        NotThereError: it cannot be downloaded, or the installed helper is missing.
    """
    wheels = HOME / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    command += [str(wheels), "--python-version", "3.12", "--only-binary=:all:"]
    exact = series if series.count(".") > 1 else f"{series}.*"
    done = subprocess.run(
        [*command, f"megatron-core=={exact}"], stderr=subprocess.PIPE, text=True, check=False
    )
    found = sorted(wheels.glob(f"megatron_core-{series}*.whl"), key=_number)
    if not found:
        raise NotThereError(
            f"megatron-core {series} cannot be downloaded, and {wheels} has none: a network to a "
            f"package index is needed. pip says:\n{done.stderr.strip()}"
        )
    if done.returncode:
        print(f"no network; taking {found[-1].name} of an earlier download", flush=True)
    folder = HOME / ".".join(map(str, _number(found[-1])))
    if not folder.exists():
        _unpack(found[-1], folder)
    return folder


def _number(wheel: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", wheel.name.split("-")[1])))


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack a wheel, with the installed version's helper where Python is older than 3.12."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial)
    place = Path("megatron", "core", "datasets")
    helper = f"helpers_cpp.{sys.implementation.cache_tag}"
    if not list((partial / place).glob(f"{helper}*.so")):
        installed = [
            path
            for entry in sys.path
            for path in (Path(entry) / place).glob("helpers_cpp*.so")
            if path.name.startswith(helper)
        ]
        if not installed:
            raise NotThereError(
                f"megatron-core's compiled helper of datasets is not there for this Python "
                f"({helper}*.so): install megatron-core 0.16.1 (make setup)"
            )
        shutil.copy2(installed[0], partial / place)
    partial.rename(folder)


def run(version: str, part: str, path: Path | None, golden: list[float]) -> Result:
    """One part on a version whose folder is `path` (None = the installed one)."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, filter(None, (path, ROOT)))))
    started = time.monotonic()
    print(f"megatron-core {version}: {part} ...", flush=True)
    if part == "demo":
        passed, summary = _demo(version, environment, golden)
    else:
        log = HOME / f"{version}-{part}.log"
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                [sys.executable, *PARTS[part]],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
        lines = log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"]
        passed, summary = done.returncode == 0, re.sub(r" in [\d.]+s.*", "", lines[-1])
        if not passed:
            summary += f" (build/next/{log.name})"
    seconds = time.monotonic() - started
    print(f"  {'passed' if passed else 'FAILED'} in {seconds:.0f} s: {summary}", flush=True)
    return Result(version, part, passed, seconds, summary)


def _demo(version: str, environment: dict[str, str], golden: list[float]) -> tuple[bool, str]:
    """A few steps of the demo on two pipeline stages, saved; its losses to the last bit."""
    runs = HOME / "runs" / version
    shutil.rmtree(runs, ignore_errors=True)
    settings = {
        "training.runs_dir": str(runs),
        "training.steps": DEMO_STEPS,
        "schedule.warmup_steps": 1,
        "training.validate_every": 0,
        "training.global_batch_size": 4,
        "training.micro_batch_size": 2,
        "checkpoint.every": DEMO_STEPS,
        "tracking.mlflow": "false",
        "tracking.log_every": 1,
        "tracking.sample_prompt": "null",
        "data.text": str(ROOT / "keel_megatron"),
        "data.vocab_size": 512,
        "data.cache_dir": str(HOME / "data"),
    }
    command = [sys.executable, "-m", "keel_megatron", "train", str(ROOT / "yaml" / "demo.yaml")]
    command += ["--processes", "2", *(f"{key}={value}" for key, value in settings.items())]
    log = HOME / f"{version}-demo.log"
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        return False, f"keel train ended with {code} (build/next/{log.name})"
    lines = (runs / "demo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    if not golden:
        golden.extend(losses)
    same = losses == golden
    return same, f"losses {'equal' if same else f'{losses}, not {golden}'} to the last bit"


def table(results: list[Result], versions: list[str]) -> str:
    """The results as a Markdown table, a version a line."""
    parts = list(dict.fromkeys(result.part for result in results))
    lines = [f"| megatron-core | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for version in versions:
        cells = [
            f"{'passed' if r.passed else 'FAILED'}, {r.seconds:.0f} s"
            for part in parts
            for r in results
            if (r.version, r.part) == (version, part)
        ]
        lines.append(f"| {version} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=SERIES, help="such as 0.19 or 0.19.2")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    arguments = parser.parse_args()
    try:
        folders = {folder.name: folder for folder in map(unpacked, arguments.versions)}
    except NotThereError as error:
        sys.exit(f"error: {error}")
    results, golden = [], []
    if "demo" in arguments.only:
        base = run("installed", "demo", None, golden)
        if not base.passed:
            sys.exit("error: the demo fails on the installed version of megatron-core")
    for version, folder in folders.items():
        results += [run(version, part, folder, golden) for part in arguments.only]
    print("\n" + table(results, list(folders)))
    sys.exit(0 if all(result.passed for result in results) else 1)


if __name__ == "__main__":
    main()
