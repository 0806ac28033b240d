"""Run the tests across hosts and write their results as a table.

python tools/hosts_table.py   # as root, about 10 minutes; writes docs/benchmarks/hosts.md
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

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "hosts.md"
HEAD = """# Runs across hosts that fail

`python tools/hosts_table.py` ({date}, {cores} cores of {machine}, gloo):
hosts are network namespaces of one machine with names, addresses and cables of their own, each with
`launchers/torchrun.sh`. A dead or cut-off host's peers get no word of it. Every run's losses and
gradient norms were compared bit by bit with an undisturbed run's on one host, and were equal. The
checkpoint interval is 4 steps, `training.hang_timeout` 8 s.

| hosts | layout | rendezvous | what failed | steps lost | until it was named |
|---|---|---|---|---:|---:|
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/integration/test_hosts.py"],
            cwd=ROOT,
            env=os.environ | {"KEEL_HOSTS_TABLE": str(lines)},
        )
        if done.returncode or not lines.is_file():
            sys.exit("the tests did not pass, or were skipped; nothing written")
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
    head = HEAD.format(date=datetime.now(UTC).date(), cores=os.cpu_count(), machine=machine())
    PAGE.write_text(head + "".join(row_text(*row) for row in rows), encoding="utf-8")


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
