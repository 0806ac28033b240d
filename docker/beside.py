"""Constraints for installing beside what an image has, without replacing it.

python beside.py constraints.txt > beside.txt    # what it lacks as pinned there, torch as it is
python beside.py --check beside.txt > TRUE.txt   # after the installation: what the image now has

constraints.txt says nothing about the packages of the base image. So the image carries its own list
(/opt/keel/constraints.txt): what was installed as pinned, what the base brought, and what of that a
requirement replaced. The check fails if torch has changed, or if an installed package is pinned
nowhere.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

OF_BASE = "# base: "
OWN = "keel-megatron"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Versions by names; the first on the path is the one that is imported."""
    found: dict[str, str] = {}
    for each in distributions():
        if each.name:
            found.setdefault(normal(each.name), each.version)
    return found


def pins(lines: list[str]) -> dict[str, str]:
    """The lines NAME==VERSION."""
    kept = (line.partition("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normal(name): version.strip() for name, _, version in kept}


def beside(constraints: list[str]) -> list[str]:
    """torch as it is, the pins of what is not installed, and, as comments, what is."""
    present = installed()
    if "torch" not in present:
        raise SystemExit("the base has no torch: BASE is to be an image of PyTorch")
    absent = [f"{name}=={pin}" for name, pin in pins(constraints).items() if name not in present]
    of_base = [f"{OF_BASE}{name}=={version}" for name, version in sorted(present.items())]
    return [f"torch=={present['torch']}", *absent, *of_base]


def truth(lines: list[str]) -> list[str]:
    """What is installed now, by where it comes from."""
    now, pinned = installed(), pins(lines)
    base = pins([line.removeprefix(OF_BASE) for line in lines if line.startswith(OF_BASE)])
    if now.get("torch") != pinned["torch"]:
        raise SystemExit(
            f"the base has torch=={pinned['torch']}, the installation made torch=="
            f"{now.get('torch')} of it"
        )
    new = {name: version for name, version in now.items() if name not in base}
    wrong = sorted(name for name in new if name != OWN and new[name] != pinned.get(name))
    if wrong:
        raise SystemExit(f"installed, but in neither the base nor constraints.txt: {wrong}")
    replaced = {name: now[name] for name in base if name in now and now[name] != base[name]}
    kept = {name: now[name] for name in base if name in now and name not in replaced}
    sections = {
        "Installed as constraints.txt pins it:": new,
        "Of the base, replaced by a requirement of the above; pinned nowhere:": replaced,
        "Of the base, as it was:": kept,
    }
    return [
        line
        for title, group in sections.items()
        for line in (f"# {title}", *(f"{name}=={group[name]}" for name in sorted(group)))
    ]


def main() -> None:
    *option, path = sys.argv[1:]
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    print("\n".join(truth(lines) if option == ["--check"] else beside(lines)))


if __name__ == "__main__":
    main()
