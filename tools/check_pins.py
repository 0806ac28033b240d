"""Check that the pins of constraints.txt can be installed on every declared Python, and together.

python tools/check_pins.py              # Python 3.11, 3.12 and 3.13; part of make lock
python tools/check_pins.py 3.13

pip resolves the pins for Linux on x86_64 from the index's metadata alone: nothing is downloaded but
a pip that is new enough to do so. A pin without a wheel for a Python must at least have an sdist
that accepts it, as DeepSpeed's has. Then uv resolves the project with all extras at these pins, for
the first release of each Python (3.11.0), against the torch of the index, which requires a certain
triton. Exit code 1 if a pin has neither, or if there is no solution.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "pins"
PIP = "pip>=26"
"""From 23.3 on a dry run does not download wheels whose metadata the index has."""
UV = "uv>=0.9"
CLASSIFIER = "Programming Language :: Python :: 3."


class NoAnswerError(Exception):
    """The index did not answer; the message is pip's."""


def pythons() -> list[str]:
    """The versions that pyproject.toml declares, such as `3.11`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [name for name in project["classifiers"] if name.startswith(CLASSIFIER)]
    return [name.rpartition(" ")[2] for name in found]


def pins(text: str, python: str) -> list[str]:
    """The pins of a constraints file that apply to a Python, as `name==version`."""
    found = []
    for line in text.splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement:
            continue
        pin = Requirement(requirement)
        here = {"python_version": python, "python_full_version": f"{python}.0"}
        if pin.marker is None or pin.marker.evaluate(here):
            found.append(f"{pin.name}{pin.specifier}")
    return found


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A new enough pip with these arguments.

    Raises:
        NoAnswerError: it cannot be downloaded.
    """
    wheels = sorted(CACHE.glob("pip-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", str(CACHE), PIP], stderr=subprocess.PIPE, text=True, check=False
        )
        wheels = sorted(CACHE.glob("pip-*.whl"))
        if not wheels:
            raise NoAnswerError(done.stderr.strip())
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=os.environ | {"PYTHONPATH": str(wheels[-1])},
        capture_output=True,
        text=True,
        check=False,
    )


def without_wheel(wanted: list[str], python: str) -> list[str]:
    """The pins that have no wheel for a Python.

    Raises:
        NoAnswerError: pip fails for another reason.
    """
    left, missing = list(wanted), []
    while left:
        with tempfile.TemporaryDirectory() as target:
            done = pip(
                *("install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"),
                *("--only-binary=:all:", "--python-version", python, "--target", target),
                *left,
            )
        if done.returncode == 0:
            break
        names = re.findall(r"No matching distribution found for (\S+)", done.stderr)
        if not set(names) & set(left) or "connection" in done.stderr.lower():
            raise NoAnswerError(done.stderr.strip()[-2000:])
        missing += [name for name in left if name in names]
        left = [name for name in left if name not in names]
    return missing


def has_sdist(pin: str, python: str) -> bool:
    """Whether the index has the version for a Python at all."""
    name, _, version = pin.partition("==")
    done = pip("index", "versions", name, "--python-version", python)
    return version in re.findall(r"[^\s,()]+", done.stdout)


def conflict(python: str) -> str:
    """Why the project with all extras cannot be installed at the pins; empty if it can.

    Raises:
        NoAnswerError: uv cannot be installed.
    """
    if not (CACHE / "uv").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(CACHE), UV]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise NoAnswerError(done.stderr.strip())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--all-extras"),
            *("--constraint", "constraints.txt", "--python-version", f"{python}.0", "--quiet"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(CACHE)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.stderr.strip() if done.returncode else ""


def main() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    absent = 0
    try:
        for python in sys.argv[1:] or pythons():
            wanted = pins(text, python)
            missing = without_wheel(wanted, python)
            sdists = [pin for pin in missing if has_sdist(pin, python)]
            neither = [pin for pin in missing if pin not in sdists]
            absent += len(neither)
            print(f"Python {python}: {len(wanted) - len(missing)} of {len(wanted)} pins as wheels")
            for what, names in (("sdist only", sdists), ("NOT THERE", neither)):
                if names:
                    print(f"  {what}: {', '.join(names)}", flush=True)
            if reason := conflict(python):
                absent += 1
                print(f"  NOT TOGETHER: {reason}", flush=True)
    except NoAnswerError as error:
        sys.exit(f"error: the package index cannot be asked: {error}")
    sys.exit(1 if absent else 0)


if __name__ == "__main__":
    main()
