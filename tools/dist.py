"""Build the source distribution and the wheel, twice, and try the wheel without a checkout.

python tools/dist.py                          # make dist: build, compare, check, install, run
python tools/dist.py --no-trial               # only build, compare and check
python tools/dist.py --pip-args "--extra-index-url https://download.pytorch.org/whl/cpu"

Files are those of the last commit, and every time in the archives is that commit's
(SOURCE_DATE_EPOCH). The second build is from another folder, with other file times, another umask
and another time zone; its bytes must be the same. The wheel is built from the source distribution.

The trial installs the wheel into a new virtual environment, torch first and pinned as `make setup`
does, and runs `keel` there in an empty folder, with an empty home.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

from keel_megatron import __version__

ROOT = Path(__file__).resolve().parent.parent
NEEDED_GB = 3.0
"""Free disk that the trial needs: torch's CPU build and what training depends on."""
TRIAL = (
    "keel --version",
    "keel --help",
    "keel config list",
    "keel config copy demo mine.yaml",
    "keel config show mine.yaml training.name=mine",
    "keel plan demo",
    "keel plan paper/keel_1024",
    "keel train demo --processes 2 training.steps=4 schedule.warmup_steps=1",
    "keel runs",
    "keel generate runs/demo --prompt 'def ' --max-new-tokens 8",
)
"""Run in an empty folder, in this order."""


def committed(target: Path, epoch: int, root: Path = ROOT) -> None:
    """Write the files of the last commit to a folder, dated `epoch`."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", "HEAD"], cwd=root, check=True, stdout=subprocess.PIPE
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extraction_filter = getattr(tarfile, "tar_filter", None)  # from Python 3.11.4 on
        tar.extractall(target)
    for path in target.rglob("*"):
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def commit_time(root: Path = ROOT) -> int:
    """Seconds since 1970 of the last commit."""
    command = ["git", "log", "-1", "--format=%ct"]
    return int(subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE).stdout)


def hook(name: str, source: Path, out: Path, epoch: int, **environment: str) -> Path:
    """Call a PEP 517 hook of the build backend in a folder; returns the archive it wrote."""
    code = (
        "import sys; from setuptools import build_meta\n"
        "print(getattr(build_meta, sys.argv[1])(sys.argv[2]), file=sys.stderr)"
    )
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(out)],
        cwd=source,
        env=kept | {"SOURCE_DATE_EPOCH": str(epoch)} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}{done.stderr}")
    return out / done.stderr.split()[-1]


def normalise(archive: Path, epoch: int) -> None:
    """Rewrite a .tar.gz: sorted, owned by root, dated `epoch`. setuptools does not do it."""
    with tarfile.open(archive) as tar:
        entries = sorted(tar.getmembers(), key=lambda entry: entry.name)
        contents = [tar.extractfile(entry) if entry.isfile() else None for entry in entries]
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as out:
            for entry, content in zip(entries, contents, strict=True):
                entry.uid = entry.gid = 0
                entry.uname = entry.gname = ""
                entry.mtime, entry.pax_headers = epoch, {}
                entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
                out.addfile(entry, content)
    with (
        archive.open("wb") as stream,
        gzip.GzipFile("", "wb", mtime=epoch, fileobj=stream) as packed,
    ):
        packed.write(data.getvalue())


def build(
    source: Path, out: Path, epoch: int, umask: int = 0o022, **environment: str
) -> list[Path]:
    """Build both archives from a folder of source files; the wheel from the sdist's."""
    out.mkdir(parents=True, exist_ok=True)
    before = os.umask(umask)
    try:
        sdist = hook("build_sdist", source, out, epoch, **environment)
        normalise(sdist, epoch)
    finally:
        os.umask(before)
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder, tarfile.open(sdist) as tar:
        tar.extraction_filter = getattr(tarfile, "tar_filter", None)
        tar.extractall(folder)
        before = os.umask(0o022)  # the wheel keeps modes of the files that setuptools writes
        try:
            unpacked = Path(folder) / sdist.name.removesuffix(".tar.gz")
            wheel = hook("build_wheel", unpacked, out, epoch, **environment)
        finally:
            os.umask(before)
    return [sdist, wheel]


def content_problems(wheel: Path, root: Path = ROOT) -> list[str]:
    """What a wheel lacks of the package's files, and what it has beside them."""
    package = root / "keel_megatron"
    wanted = {
        path.relative_to(root).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    bundled = (package / "configs").resolve().rglob("*.yaml")
    wanted |= {
        f"keel_megatron/configs/{path.relative_to(package.joinpath('configs').resolve())}"
        for path in bundled
        if path.parent.name != "evaluation"  # lm-eval's task files, given by their folder
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        licences = [n for n in archive.namelist() if n.endswith(".dist-info/licenses/LICENSE")]
    wrong = [f"missing: {name}" for name in sorted(wanted - found)]
    wrong += [f"does not belong there: {name}" for name in sorted(found - wanted)]
    if metadata["Version"] != __version__:
        wrong.append(f"version {metadata['Version']}, not {__version__}")
    if metadata["License-Expression"] != "Apache-2.0" or not licences:
        wrong.append("the licence is not in the metadata")
    return wrong


def changelog_problems(version: str, text: str) -> list[str]:
    """Whether CHANGELOG.md has a section for a release, or for what comes."""
    if "dev" in version:
        return [] if "## [Unreleased]" in text else ["CHANGELOG.md: no section [Unreleased]"]
    return [] if f"## [{version}] - 20" in text else [f"CHANGELOG.md: no section [{version}]"]


def report(archives: Sequence[Path]) -> None:
    for path in archives:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.name}  {path.stat().st_size:,} bytes  sha256 {digest}", flush=True)


def build_twice(out: Path) -> list[Path]:
    """Build the last commit in two ways; returns the archives, whose bytes are equal.

    Raises:
        SystemExit: they differ.
    """
    epoch = commit_time()
    with tempfile.TemporaryDirectory(prefix="dist-") as folder:
        first, second = Path(folder, "source"), Path(folder, "another place", "source")
        committed(first, epoch)
        committed(second, epoch + 3601)
        archives = build(first, out, epoch)
        again = build(second, Path(folder, "again"), epoch, 0o077, TZ="Asia/Tokyo", LC_ALL="C")
        for one, other in zip(archives, again, strict=True):
            if one.read_bytes() != other.read_bytes():
                raise SystemExit(f"{one.name}: a second build has other bytes")
    return archives


def trial(wheel: Path, pip_args: Sequence[str]) -> None:
    """Install the wheel into a clean environment and run it there.

    Raises:
        SystemExit: too little disk is free, or a command fails.
    """
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    print(f"free disk: {free:.1f} GB (needed: {NEEDED_GB:.0f} GB)", flush=True)
    if free < NEEDED_GB:
        raise SystemExit(f"the trial needs {NEEDED_GB:.0f} GB in {tempfile.gettempdir()}")
    with tempfile.TemporaryDirectory(prefix="keel-trial-") as folder:
        place, home = Path(folder, "an empty folder"), Path(folder, "home")
        place.mkdir()
        home.mkdir()
        venv = Path(folder, "venv")
        dropped = ("PYTHONPATH", "VIRTUAL_ENV", "KEEL_CACHE")
        environment = {key: value for key, value in os.environ.items() if key not in dropped}
        environment |= {"HOME": str(home), "PATH": f"{venv / 'bin'}:{environment['PATH']}"}
        pins = ["--quiet", "--constraint", str(ROOT / "constraints.txt"), *pip_args]
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install"]
        for command in (
            [sys.executable, "-m", "venv", str(venv)],
            [*pip, *pins, "torch"],  # first: another package would bring CUDA's
            [*pip, *pins, str(wheel)],
            *(shlex.split(line) for line in TRIAL),
        ):
            run(command, place, environment)


def run(command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
    """Run one command of the trial, with its time; its output is shown if it fails."""
    start = time.monotonic()
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"{time.monotonic() - start:6.1f} s  {shlex.join(command)}", flush=True)
    if done.returncode:
        print(done.stdout, flush=True)  # now: removing the environment takes its time
        raise SystemExit(f"exit code {done.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--twine", type=Path, default=ROOT / ".venv" / "validators" / "bin/python")
    parser.add_argument("--pip-args", default="", help="further arguments of pip in the trial")
    parser.add_argument("--no-trial", action="store_true", help="do not install and run the wheel")
    options = parser.parse_args()
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    if changed:
        print(f"not committed, and left out:\n{changed}", end="", flush=True)
    shutil.rmtree(options.out, ignore_errors=True)
    archives = build_twice(options.out)
    report(archives)
    problems = content_problems(archives[1])
    problems += changelog_problems(__version__, (ROOT / "CHANGELOG.md").read_text("utf-8"))
    if problems:
        raise SystemExit("\n".join(problems))
    twine = [str(options.twine), "-m", "twine", "check", "--strict", *map(str, archives)]
    subprocess.run(twine, check=True)
    if not options.no_trial:
        trial(archives[1].resolve(), shlex.split(options.pip_args))


if __name__ == "__main__":
    main()
