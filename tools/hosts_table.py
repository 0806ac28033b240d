"""Run the tests across hosts and write their results as a table.

python tools/hosts_table.py              # as root, a few minutes; writes docs/benchmarks/hosts.md
python tools/hosts_table.py --from FILE  # from the lines of a run with KEEL_HOSTS_TABLE=FILE
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "hosts.md"
HEAD = """# Runs on hosts that fail

`python tools/hosts_table.py` ({date}, {cores} cores of {machine}, gloo):
hosts are network namespaces of one machine, each with its own name, address and network link, and
each runs `launchers/torchrun.sh`. The other hosts are not notified when a host dies or is
disconnected. The losses and gradient norms of every run were bit-identical to those of an
undisturbed run on one host. The checkpoint interval is 4 steps, and `training.hang_timeout` is 8 s.

| hosts | layout | rendezvous | failure | steps lost | time until it was named |
|---|---|---|---|---:|---:|
"""


def main() -> None:
    if sys.argv[1:2] == ["--from"]:
        rows = read(Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "lines"
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "tests/integration/test_hosts.py"],
                cwd=ROOT,
                env=os.environ | {"KEEL_HOSTS_TABLE": str(lines)},
            )
            if done.returncode or not lines.is_file():
                sys.exit("the tests did not pass, or were skipped; nothing written")
            rows = read(lines)
    head = HEAD.format(date=datetime.now(UTC).date(), cores=os.cpu_count(), machine=machine())
    PAGE.write_text(head + "".join(row_text(*row) for row in rows), encoding="utf-8")


def read(lines: Path) -> list[list[Any]]:
    return [json.loads(line) for line in lines.read_text().splitlines()]


def row_text(
    hosts: str, layout: str, meeting: str, what: str, lost: int | None, seconds: float | None
) -> str:
    cells = [hosts, layout, meeting, what]
    cells.append("" if lost is None else str(lost))
    cells.append("" if seconds is None else f"{seconds:.0f} s")
    return f"| {' | '.join(cells)} |\n"


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
