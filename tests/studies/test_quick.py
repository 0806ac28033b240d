"""Every study of `keel study`, at the tiny size of `make studies-quick`."""

from __future__ import annotations

import json
import math
from pathlib import Path

from keel_megatron.cli.study import app
from tests.integration.commands import keel
from tools.studies_quick import commands


def test_every_study_runs_and_writes_the_same_files(tmp_path: Path) -> None:
    names = []
    for arguments in commands(tmp_path):
        name = arguments[0]
        names.append(name)
        done = keel(tmp_path, "study", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        out = tmp_path / name
        found = json.loads((out / "results.json").read_text())
        assert found["study"] == name
        assert found["rows"]
        assert not found["missing"]
        losses = [row["loss"] for row in found["rows"] if isinstance(row.get("loss"), float)]
        assert all(math.isfinite(loss) for loss in losses)
        assert "|" in (out / "table.md").read_text()
        assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(names) == sorted(str(command.name) for command in app.registered_commands)
