"""Signals through a launcher: one asks the ranks to stop, the same one again ends them at once."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.blocked import BLOCKED, end, started
from tests.hosts import await_that
from tests.launchers.test_launchers import DEMO, LAUNCHERS, ROOT

# torchrun.sh's interpreter: its checks are content, and torchrun is this trainer's parent, which
# starts it again (as the file `started` shows) after any code but 0.
PYTHON = f"""
import os, subprocess, sys
if sys.argv[1:4] == ["-m", "keel_megatron", "config"]:
    print("FOLDER")
if sys.argv[1:3] == ["-m", "torch.distributed.run"]:
    os.environ |= {{"TORCHELASTIC_MAX_RESTARTS": "3", "LOCAL_RANK": "0"}}
    code = 1
    while code:
        with open("FOLDER/started", "a") as starts:
            starts.write("x")
        code = subprocess.call([sys.executable, "-c", {BLOCKED!r}])
"""


def command(launcher: str, folder: Path) -> list[str]:
    if launcher == "keel train --processes 2":
        code = "import sys; from keel_megatron.runtime.local_launch import launch; "
        return [sys.executable, "-c", f"{code}sys.exit(launch(2, ['-c', {BLOCKED!r}], 5))"]
    (folder / "python.py").write_text(PYTHON.replace("FOLDER", str(folder)))
    stub = folder / "python"
    # A `#!` line cannot name an interpreter whose path has a space.
    stub.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/python.py" "$@"\n')
    stub.chmod(0o755)
    return ["bash", str(LAUNCHERS / "torchrun.sh"), DEMO]


@pytest.mark.parametrize("launcher", ["keel train --processes 2", "torchrun.sh"])
def test_a_request_and_then_ctrl_c_twice(launcher: str, tmp_path: Path) -> None:
    """SIGTERM is the request; a first Ctrl-C changes nothing, a second one ends all ranks."""
    ready, said = tmp_path / "ready", tmp_path / "said"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "KEEL_PYTHON": str(tmp_path / "python"),
        "NPROC_PER_NODE": "1",
        # With one node it would start no torchrun.
        **{"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    }
    ranks = 1 if launcher == "torchrun.sh" else 2
    with (
        ready.open("wb") as out,
        said.open("wb") as err,
        started(command(launcher, tmp_path), stdout=out, stderr=err, env=environment) as process,
    ):
        await_that(lambda: ready.read_text().count("ready") == ranks, 300, "the ranks")
        process.send_signal(signal.SIGTERM)
        await_that(lambda: "SIGTERM: stopping after this step" in said.read_text(), 300, "a word")
        assert process.poll() is None
        assert end(process, signal.SIGINT) == 130
    assert said.read_text().count("stopping after this step") == 1
    assert "restarting all" not in said.read_text()
    if launcher == "torchrun.sh":
        assert (tmp_path / "started").read_text() == "x"
