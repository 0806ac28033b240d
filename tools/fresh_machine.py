"""Try the README's first commands as on a new machine: a new user, no caches, a path with a space.

python tools/fresh_machine.py                                  # make train, make test
python tools/fresh_machine.py 'make train'
python tools/fresh_machine.py 'make test TESTS=tests/config'   # as root, --user chooses a uid

The last commit is cloned into a new folder whose name has a space. The commands run there with an
empty home, a temporary folder of their own and a minimal environment: of the caller's only what
reaches the package indexes (PIP_*, npm's, proxies, certificates) stays, and pip's cache is off. Run
as root, they run as a user without privileges, who has no account. Each command's output and time
are printed; everything is removed at the end (--keep: not).
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
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["make train", "make test"]
KEPT = re.compile(
    r"PIP_\w+|(?i:npm_config)_\w+|(?i:https?|no)_proxy|SSL_CERT_\w+|\w+_CA_(BUNDLE|CERTS)"
)
NEEDED_GB = 6.0
"""Free disk for an environment with every extra of `dev`, its validators, and the demo."""
SYSTEM = "/usr/local/bin:/usr/bin:/bin"


def environment(place: Path, python: Path, caller: Mapping[str, str]) -> dict[str, str]:
    """What a new login has: nothing of the caller's but the way to the package index."""
    kept = {name: value for name, value in caller.items() if KEPT.fullmatch(name)}
    return kept | {
        "HOME": str(place / "home"),
        "LANG": "C.UTF-8",
        "PATH": f"{python.parent}:{SYSTEM}",
        "PIP_NO_CACHE_DIR": "1",
        "TMPDIR": str(place / "tmp"),
    }


def prefix(user: int) -> list[str]:
    """The command that drops root's privileges; nothing for others."""
    if os.geteuid() != 0:
        return []
    ids = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    return ["setpriv", *ids, "--no-new-privs", "--inh-caps=-all"]


def prepare(place: Path, user: int) -> Path:
    """Clone the last commit; returns the clone, which belongs to the user, as do home and tmp."""
    clone = place / "my projects" / "keel-megatron"
    clone.parent.mkdir()
    quiet = ["git", "clone", "--quiet", "--no-hardlinks", "--depth=1"]
    subprocess.run([*quiet, ROOT.as_uri(), str(clone)], check=True)
    for name in ("home", "tmp"):
        (place / name).mkdir()
    place.chmod(0o755)
    if os.geteuid() == 0:
        for path in (place, *place.rglob("*")):
            os.lchown(path, user, user)
    return clone


def attempt(command: str, clone: Path, variables: dict[str, str], user: int) -> bool:
    """Run one command; prints its time, and returns whether it succeeded."""
    print(f"$ {command}", flush=True)
    start = time.monotonic()
    done = subprocess.run(
        [*prefix(user), *shlex.split(command)],
        cwd=clone,
        env=variables,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    minutes, seconds = divmod(time.monotonic() - start, 60)
    print(f"[exit code {done.returncode}, {minutes:.0f} min {seconds:02.0f} s]", flush=True)
    return done.returncode == 0


def used_gb(folder: Path) -> float:
    """Disk space of a folder."""
    sizes = (path.lstat().st_blocks * 512 for path in folder.rglob("*"))
    return sum(sizes) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commands", nargs="*", default=COMMANDS, metavar="COMMAND")
    parser.add_argument("--user", type=int, default=10001, help="user id, where root runs this")
    parser.add_argument("--python", type=Path, default=Path("/usr/bin/python3"))
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    options = parser.parse_args()
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    print(f"free disk: {free:.1f} GB (needed: {NEEDED_GB:.0f} GB)", flush=True)
    if free < NEEDED_GB:
        sys.exit(f"{NEEDED_GB:.0f} GB are needed in {tempfile.gettempdir()}")
    place = Path(tempfile.mkdtemp(prefix="fresh-"))
    try:
        clone = prepare(place, options.user)
        variables = environment(place, options.python, os.environ)
        checks = [f"{options.python.name} --version", "id", *options.commands]
        good = all(attempt(command, clone, variables, options.user) for command in checks)
        print(f"{used_gb(place):.1f} GB of disk used in {place}")
    finally:
        if not options.keep:
            shutil.rmtree(place)
    sys.exit(not good)


if __name__ == "__main__":
    main()
