"""Constraints for installing beside what an image has, without replacing it.

python beside.py constraints.txt > beside.txt    # what it lacks as pinned there, torch as it is
python beside.py --check beside.txt              # after the installation: torch is still that one
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def beside(constraints: list[str]) -> list[str]:
    """The lines of packages that are not installed, and torch at the version that is."""
    present = {normal(found.name) for found in distributions() if found.name}
    pins = [line for line in constraints if "==" in line and not line.startswith("#")]
    absent = [line for line in pins if normal(line.partition("==")[0]) not in present]
    return [f"torch=={version('torch')}", *absent]


def main() -> None:
    *option, path = sys.argv[1:]
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    if option == ["--check"]:
        now = f"torch=={version('torch')}"
        if lines[0] != now:
            raise SystemExit(f"the base has {lines[0]}, the installation made {now} of it")
        return
    try:
        print("\n".join(beside(lines)))
    except PackageNotFoundError:
        raise SystemExit("the base has no torch: BASE is to be an image of PyTorch") from None


if __name__ == "__main__":
    main()
