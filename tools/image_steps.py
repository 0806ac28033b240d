"""Run the build steps of a Dockerfile without a container engine, in a clean virtual environment.

python tools/image_steps.py docker/Dockerfile.cpu      # up to its stage build, then `keel
--version` python tools/image_steps.py docker/Dockerfile.mlflow python tools/image_steps.py
docker/Dockerfile.cpu --arg PIP_ARGS= --then 'keel --help'

It executes COPY, ENV, ARG, WORKDIR and RUN in order, with the image's folders below a temporary
one.
Steps that need a container or Debian (apt-get, useradd, another base, mounts) are listed and
skipped, so the result is about the commands, not about the image.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FOLDERS = re.compile(r"(?<![\w/.-])/(src|opt|tmp|work|wheels|mlflow)(?=[/\s:\"']|$)")
_BEYOND = re.compile(r"^(apt-get|useradd|--mount)")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Name and argument of every instruction; continued lines are joined."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in kept.replace("\\\n", "").splitlines():
        name, _, argument = line.strip().partition(" ")
        if name:
            yield name.upper(), argument.strip()


@dataclass
class Image:
    """The folders and the environment that the steps have made so far."""

    root: Path
    arguments: dict[str, str]
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: Path = Path("/")
    left_out: list[str] = field(default_factory=list)

    def inside(self, text: str) -> str:
        """Text with the image's folders below the temporary one."""
        return _FOLDERS.sub(lambda found: f"{self.root}/{found[1]}", text)

    def expand(self, text: str) -> str:
        """Text with ${NAME} replaced."""
        return re.sub(r"\$\{(\w+)\}", lambda m: self.environment.get(m[1], ""), text)

    def take(self, name: str, argument: str) -> None:
        """Do one instruction."""
        if name == "ARG":
            key, _, default = argument.partition("=")
            self.environment[key] = self.arguments.get(key, "".join(shlex.split(default)))
        elif name == "ENV":
            for part in shlex.split(self.inside(argument)):
                key, _, value = part.partition("=")
                self.environment[key] = self.expand(value)
        elif name == "WORKDIR":
            self.folder = Path(self.inside(argument))
            self.folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            self.copy(argument)
        elif name == "RUN":
            self.run(argument)

    def copy(self, argument: str) -> None:
        *sources, target = shlex.split(argument)
        if sources[0].startswith("--from"):
            self.left_out.append(f"COPY {argument}")
            return
        place = self.folder / self.inside(target)
        for source in (ROOT / source for source in sources):
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, place, ignore=ignored, dirs_exist_ok=True)
                continue
            many = len(sources) > 1 or target.endswith("/") or place.is_dir()
            (place if many else place.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(source, place)

    def run(self, command: str) -> None:
        if _BEYOND.match(command):
            self.left_out.append(f"RUN {command}")
            return
        print(f"RUN {command}", flush=True)
        subprocess.run(
            ["/bin/sh", "-ec", self.inside(command)],
            cwd=self.folder,
            env=self.environment,
            check=True,
        )


def build(dockerfile: Path, stage: str | None, image: Image) -> None:
    """Take the instructions of the first stage, or of a named one's way there."""
    seen = False
    for name, argument in instructions(dockerfile.read_text(encoding="utf-8")):
        if name == "FROM":
            if seen:
                return
            seen = stage is None or argument.endswith(f" AS {stage}")
        elif seen:
            image.take(name, argument)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--stage", help="default: the first")
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--then", help="a command to run in what was built")
    options = parser.parse_args()
    arguments = dict(argument.split("=", 1) for argument in options.arg)
    with tempfile.TemporaryDirectory(prefix="image-") as folder:
        base = Path(folder) / "base"
        subprocess.run([sys.executable, "-m", "venv", str(base)], check=True)
        image = Image(Path(folder), arguments)
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            image.environment.pop(name, None)
        image.environment["PATH"] = f"{base / 'bin'}:{image.environment['PATH']}"
        build(options.dockerfile, options.stage, image)
        if options.then:
            image.run(options.then)
    for line in image.left_out:
        print(f"not run here: {line}")


if __name__ == "__main__":
    main()
