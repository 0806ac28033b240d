"""The watchdog: who is named, and that a hung group of real ranks ends and starts again."""

from __future__ import annotations

import os
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel_megatron.cluster import watchdog
from keel_megatron.cluster.watchdog import RankReport, Watchdog, verdict
from keel_megatron.runtime import exit_codes, local_launch
from tests.cluster.test_flight_recorder import HUNG

# Rank 1 hangs in the first start and not in the second. There the watchdog has more patience than a
# busy machine needs, and before the hang a single step is due.
RANK = """
import os, signal, sys, time
from pathlib import Path
from keel_megatron.config.run import RunConfig
from keel_megatron.runtime.distributed import start
from keel_megatron.cluster import watchdog as module
from keel_megatron.cluster.watchdog import Watchdog
from tests.settings import small_config

if sys.argv[1] == "sleep":
    module.ANSWER_SECONDS = 300.0  # every rank will report: no wait is too long

def oversleep():
    time.sleep(600)

config = small_config(parallel__pipeline=2)
with start(config.parallel, config.training) as runtime:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    with Watchdog(runtime, Path("run"), 4.0 if first else 300.0) as watchdog:
        for step in range(3):
            if step == 1 and runtime.rank == 1 and first:
                oversleep() if sys.argv[1] == "sleep" else os.kill(os.getpid(), signal.SIGSTOP)
            runtime.barrier()
            watchdog.mark(f"step {step + 1}")
"""


def report(rank: int, **values: Any) -> RankReport:
    wanted = {
        "place": f"rank {rank} (stage {rank})",
        "marks": 7,
        "last": "step 7",
        "seconds": 60.0,
        "main_thread": "distributed_c10d.py:1 (barrier)",
        "waits": True,
    }
    return RankReport(rank=rank, **(wanted | values))


@pytest.mark.parametrize(
    ("reports", "hosts", "expected"),
    [
        ([report(0), report(2)], ["a"] * 3, "rank 1 gives no answer (stopped, dead or cut off)"),
        (
            [report(0), report(1, waits=False, main_thread="data.py:3 (read)"), report(2)],
            ["a"] * 3,
            "rank 1 (stage 1) did not arrive: 60 s after step 7 it is at data.py:3 (read)",
        ),
        # All are somewhere in a collective: the one that lags behind.
        (
            [report(0), report(1, marks=6, last="step 6")],
            ["a"] * 2,
            "rank 1 (stage 1) did not arrive",
        ),
        # On CUDA everybody seems busy: the one that is elsewhere.
        (
            [report(n, waits=False, main_thread="x" if n == 2 else "engine") for n in range(4)],
            ["a"] * 4,
            "rank 2 (stage 2) did not arrive: 60 s after step 7 it is at x",
        ),
        # On CUDA, by what NCCL has been given: it has not joined the others' 8th collective.
        (
            [
                report(n, pending="all_reduce (DP)", collectives={"1": 8 - n % 2, f"own {n}": n})
                for n in range(2)
            ]
            + [report(2, pending="all_reduce (DP)", collectives={"1": 8})],
            ["a"] * 3,
            "did not arrive: 60 s after step 7 it is at distributed_c10d.py:1 (barrier); "
            "the others wait in all_reduce (DP)",
        ),
        ([report(0), report(1)], ["a"] * 2, "every rank waits for another one"),
        # Nodes: who gives no answer is on one, and so is who cannot be reached.
        ([report(0)], ["a", "b", "b"], "rank 1, 2 on host b gives no answer"),
        (
            [report(0, host="a", unanswered=["b"]), report(1, host="b", unanswered=["a"])],
            ["a", "b"],
            "the hosts a and b do not reach each other",
        ),
        (
            [
                report(0, host="a", unanswered=["b"]),
                report(1, host="b", unanswered=["a", "c"]),
                report(2, host="c", unanswered=["b"]),
            ],
            ["a", "b", "c"],
            "host b is cut off: no connection to a, c",
        ),
        ([report(0, waits=False)], ["a"], "60 s after step 7 it is at distributed_c10d.py:1"),
    ],
)
def test_who_is_named(reports: list[RankReport], hosts: list[str], expected: str) -> None:
    text = verdict(reports, hosts, 60.0)
    assert text.startswith("watchdog: no progress in training.hang_timeout = 60 s: ")
    assert expected in text


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("sleep", "rank 1 (pipeline stage 1, tensor rank 0, replica 0) did not arrive"),
        ("stop", "rank 1 gives no answer (stopped, dead or cut off); the others wait"),
    ],
)
def test_a_hung_rank_is_named_and_the_group_starts_again(
    tmp_path: Path, how: str, named: str
) -> None:
    code = (
        f"import sys; import {local_launch.__name__} as local_launch; "
        "local_launch.GRACE_SECONDS = 1.0; "  # a stopped rank does not hear SIGTERM
        f"sys.exit(local_launch.launch(2, ['-c', {RANK!r}, {how!r}], 1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert named in done.stderr
    assert "To resume, start the same command again." in done.stderr
    assert "restarting all 2 process(es) (1 of 1)" in done.stderr
    (hang,) = (tmp_path / "run" / "hangs").iterdir()
    assert named in (hang / "verdict.txt").read_text()
    stacks = {path.name: path.read_text() for path in hang.glob("rank_*.txt")}
    assert ("rank_00001.txt" in stacks) == (how == "sleep")
    assert "in barrier" in stacks["rank_00000.txt"]
    assert '"last": "step 1"' in stacks["rank_00000.txt"]
    assert "thread watchdog" in stacks["rank_00000.txt"]
    if how == "sleep":
        assert "in oversleep" in stacks["rank_00001.txt"]


def test_a_mark_costs_nothing_that_a_step_would_notice() -> None:
    """A step takes 10 ms at the very least, thousands of times what calling anything takes."""
    from keel_megatron.cluster.watchdog import Watchdog

    watchdog = Watchdog.__new__(Watchdog)
    watchdog._marks = 0

    def fastest(call: Callable[[], object]) -> float:
        return min(timeit.repeat(call, number=100, repeat=100))

    assert fastest(lambda: watchdog.mark("step 1")) < 30 * fastest(lambda: None)


def test_a_folder_that_cannot_be_written_does_not_change_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    hung = object.__new__(Watchdog)
    hung._folder, hung._timeout = tmp_path / "file" / "hangs", 0.1
    hung._runtime = SimpleNamespace(hosts=["a"], rank=0)
    codes: list[int] = []
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_a, **_k: None)
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    hung._end_group()
    assert codes == [exit_codes.HUNG]


def test_on_cuda_nccls_messages_are_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = SimpleNamespace(
        hosts=["a"], host="a", rank=0, device=torch.device("cuda"), describe=lambda: "rank 0"
    )
    hung = object.__new__(Watchdog)
    hung._folder, hung._timeout, hung._runtime = tmp_path / "hangs", 0.1, runtime
    hung._marks, hung._last, hung._time, hung._main = 3, "step 3", 0.0, None
    hung._doorbells = SimpleNamespace(unanswered=list)
    codes: list[int] = []
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_a, **_k: None)
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    monkeypatch.setattr(watchdog.flight_recorder, "dump", lambda: HUNG)
    hung._end_group()
    (found,) = watchdog.read_reports(hung._folder)
    assert found.pending == "all_reduce (DATA_PARALLEL_GROUP)"
    assert found.waits
    assert (hung._folder / "nccl_00000.json").read_text() == HUNG
    # A format of another version costs the messages only.
    monkeypatch.setattr(watchdog.flight_recorder, "dump", lambda: "{'")
    hung._end_group()
    (found,) = watchdog.read_reports(hung._folder)
    assert found.whole
    assert not found.waits
    assert codes == [exit_codes.HUNG] * 2
