"""Write docker/locks/*.txt: the pins of constraints.txt that an image installs, with their hashes.

python tools/lock.py    # make lock

pip resolves each image's requirements within constraints.txt, without installing them, and reports
the hash of every file. The files depend on the platform, so this must run on the images' platform
(Linux on x86_64, CPython 3.11). torch, whose CPU build comes from its own index, and DeepSpeed,
which is built against that torch, are excluded; the images install them by constraints.txt alone.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "docker" / "locks"
LEFT_OUT = {"torch", "deepspeed"}
HEAD = "# Made by `make lock`: Linux on x86_64, CPython 3.11; without torch and DeepSpeed.\n"


def requirements() -> dict[str, list[str]]:
    """Requirements of each image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cpu = [*project["dependencies"], "setuptools"]
    dev = with_extras("dev", project["optional-dependencies"])
    return {"cpu": cpu, "test": [*cpu, *dev], "mlflow": ["mlflow[auth]", "psycopg2-binary"]}


def with_extras(name: str, extras: dict[str, list[str]]) -> list[str]:
    """Requirements of an extra, with those of the project's other extras that it names."""
    found = []
    for each in extras[name]:
        own = re.fullmatch(r"keel-megatron\[(.+)\]", each)
        if own is None:
            found.append(each)
            continue
        for other in own[1].split(","):
            found += with_extras(other, extras)
    return found


def resolve(wanted: list[str]) -> list[dict[str, Any]]:
    """pip's report of what it would install."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--no-build-isolation", "--constraint", str(ROOT / "constraints.txt")]
    done = subprocess.run(
        [*command, "--report", "-", *wanted],
        env=os.environ | {"DS_BUILD_OPS": "0"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return list(json.loads(done.stdout)["install"])


def lines(report: list[dict[str, Any]]) -> list[str]:
    """A line of a requirements file for each package."""
    found = {}
    for entry in report:
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        normal = re.sub(r"[-_.]+", "-", name).lower()
        if normal not in LEFT_OUT:
            digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
            found[normal] = f"{normal}=={version} --hash=sha256:{digest}\n"
    return [found[name] for name in sorted(found)]


def main() -> None:
    here = (platform.system(), platform.machine(), *sys.version_info[:2])
    if here != ("Linux", "x86_64", 3, 11):
        raise SystemExit("the images' platform is needed: Linux on x86_64 with CPython 3.11")
    LOCKS.mkdir(exist_ok=True)
    for name, wanted in requirements().items():
        text = HEAD + "".join(lines(resolve(wanted)))
        (LOCKS / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"docker/locks/{name}.txt: {text.count('--hash')} packages")


if __name__ == "__main__":
    main()
