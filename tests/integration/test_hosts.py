"""Training across hosts that have addresses, names and cables of their own (tests/hosts.py).

With KEEL_HOSTS_TABLE=FILE each case leaves a line there for tools/hosts_table.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import yaml
from keel_megatron.checkpoint import folder as checkpoints
from tests.hosts import Hosts, await_that, why_not
from tests.integration.commands import environment, keel, losses_of, write_config

ROOT = Path(__file__).resolve().parents[2]
STEPS = 32
"""Many more than are made while a test sees that one was."""
CALM: dict[tuple[str, ...], list[tuple[int, float, float]]] = {}
HANG = 8
"""Seconds without progress until the watchdog acts."""
END = 600
"""Seconds in which launchers must end: many times what they need, however busy the machine is."""
PIPELINE, DATA = "parallel.pipeline=2", "parallel.pipeline=1"


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


class Job:
    """One run on some hosts, started on each by launchers/torchrun.sh."""

    def __init__(self, folder: Path, hosts: Hosts, *settings: str, static: bool) -> None:
        self.folder, self.hosts, self.static = folder, hosts, static
        write_config(
            folder,
            Path(argparse.__file__),
            checkpoint__every=4,
            training__validation_sequences=4,
            training__hang_timeout=float(HANG),
            parallel__timeout_seconds=40.0,
        )
        built = keel(folder, "data", "build", "run.yaml")  # several machines build none
        assert built.returncode == 0, built.stderr
        self.settings = [f"training.steps={STEPS}", *settings]
        self.metrics = folder / "runs" / "test" / "metrics.jsonl"

    def start(
        self, name: str, *options: str, verb: str = "", **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start the launcher on a host."""
        first = self.hosts.names[0]
        meeting = (
            {"MASTER_ADDR": first}
            if self.static
            else {"RDZV_ENDPOINT": f"{first}:29400", "RDZV_ID": "a random text"}
        )
        env = environment() | {
            "PYTHONPATH": str(ROOT),
            "KEEL_PYTHON": sys.executable,
            "NNODES": str(len(self.hosts.names)),
            "NODE_RANK": str(self.hosts.names.index(name)),
            **meeting,
            **variables,
        }
        command = [str(ROOT / "launchers" / "torchrun.sh"), *options, "run.yaml", *self.settings]
        return self.hosts.start(name, command, self.folder, env, self.folder / f"{name}.log")

    def start_all(self, *options: str) -> list[subprocess.Popen[bytes]]:
        return [self.start(name, *options) for name in self.hosts.names]

    def await_step(self, step: int, saved: bool = False) -> None:
        """Wait for a step, and for a checkpoint that is finished."""

        def there() -> bool:
            return self.reached() >= step and bool(
                not saved or checkpoints.steps(self.metrics.parent)
            )

        await_that(there, END, f"step {step}:\n{self.logs()}")

    def reached(self) -> int:
        steps = losses_of(self.metrics) if self.metrics.is_file() else []
        return steps[-1][0] if steps else 0

    def newest_checkpoint(self) -> int:
        """The last one that was finished; while nothing trains."""
        return checkpoints.steps(self.metrics.parent)[-1]

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def logs(self) -> str:
        return "\n".join(f"== {name}\n{self.log(name)[-3000:]}" for name in self.hosts.names)

    def all_end(self, started: list[subprocess.Popen[bytes]]) -> list[int]:
        """Exit codes of the launchers, in bounded time."""
        end = time.monotonic() + END
        for process in started:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {END} s:\n{self.logs()}") from None
        return [process.returncode for process in started]

    def resumed_from(self) -> list[int]:
        log = (self.metrics.parent / "log.txt").read_text()
        return [int(step) for step in re.findall(r"resuming from \S+step_(\d+)", log)]


@pytest.fixture
def two(_allowed: None) -> Iterator[Hosts]:
    with Hosts("host-a", "host-b") as hosts:
        yield hosts


def calm(tmp_path_factory: pytest.TempPathFactory, *settings: str) -> list:
    """The losses of the same run on this machine alone, undisturbed; made once for each layout."""
    if settings not in CALM:
        folder = tmp_path_factory.mktemp("calm")
        write_config(folder, Path(argparse.__file__), training__validation_sequences=4)
        processes = "4" if "training.global_batch_size=8" in settings else "2"
        done = keel(
            folder, "train", "run.yaml", f"training.steps={STEPS}", *settings,
            "--processes", processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        CALM[settings] = losses_of(folder / "runs" / "test" / "metrics.jsonl")
        assert len(CALM[settings]) == STEPS
    return CALM[settings]


def note(job: Job, layout: str, what: str, lost: int | None, seconds: float | None) -> None:
    """A line of the table; the losses have been compared."""
    if "KEEL_HOSTS_TABLE" in os.environ:
        meeting = "static" if job.static else "c10d"
        row = [", ".join(job.hosts.names), layout, meeting, what, lost, seconds]
        with Path(os.environ["KEEL_HOSTS_TABLE"]).open("a") as table:
            table.write(json.dumps(row) + "\n")


@pytest.mark.slow
def test_a_pipeline_across_hosts_outlasts_a_short_cut(
    tmp_path: Path, two: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    job = Job(tmp_path, two, PIPELINE, static=True)
    started = job.start_all()
    job.await_step(5)
    two.cut("host-b")
    time.sleep(2)
    assert (before := job.reached()) < STEPS
    two.mend("host-b")
    assert job.all_end(started) == [0, 0], job.logs()
    assert losses_of(job.metrics) == calm(tmp_path_factory, PIPELINE)
    assert job.resumed_from() == []
    assert before >= 5
    assert "pre-flight of 2 node(s), 2 rank(s)" in job.log("host-a")
    assert "pipeline, between hosts: 1 link(s)" in job.log("host-a")
    assert (job.metrics.parent / "exit_code").read_text() == "0\n"
    note(job, "PP 2", "host-b disconnected for 2 s", 0, None)


def test_a_replica_on_a_host_that_dies_goes_on_when_it_is_back(
    tmp_path: Path, two: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The survivor names the dead host, waits for it, and both go on from the checkpoint."""
    job = Job(tmp_path, two, DATA, static=False)
    first, _second = job.start_all("--max-restarts", "3")
    job.await_step(6, saved=True)
    two.power_off("host-b")
    began = time.monotonic()
    named = "rank 1 on host host-b gives no answer (stopped, dead or cut off)"
    await_that(lambda: named in job.log("host-a"), END, f"a verdict:\n{job.logs()}")
    seconds = time.monotonic() - began
    reached, newest = job.reached(), job.newest_checkpoint()
    two.mend("host-b")
    again = job.start("host-b", "--max-restarts", "3")
    assert job.all_end([first, again]) == [0, 0], job.logs()
    assert losses_of(job.metrics) == calm(tmp_path_factory, DATA)
    (resumed,) = job.resumed_from()
    assert resumed == newest
    assert 4 <= resumed <= reached
    note(job, "DP 2", "host-b powered off and restarted", reached - resumed, seconds)


@pytest.mark.slow
def test_the_doctor_names_a_slow_cable(tmp_path: Path) -> None:
    """Four stages on four hosts; the third one's cable carries 1 MB/s."""
    with Hosts("host-a", "host-b", "host-c", "host-d") as hosts:
        hosts.throttle("host-c", 8)
        job = Job(tmp_path, hosts, "parallel.pipeline=4", static=True)
        started = job.start_all("--doctor", "--max-restarts", "0")
        assert job.all_end(started) == [0] * 4, job.logs()
        log = job.log("host-a")
        slow = re.findall(
            r"warning: slow link host (\S+) -> host (\S+) .*: (\S+) MB/s, others", log
        )
        assert [pair[:2] for pair in slow] == [("host-b", "host-c"), ("host-c", "host-d")], log
        assert all(float(pair[2]) < 3 for pair in slow)
        assert "pre-flight of 4 node(s), 4 rank(s)" in log
        note(
            job,
            "PP 4",
            "`keel doctor`, host-c's link at 1 MB/s: both its connections are named",
            None,
            None,
        )


@pytest.mark.slow
def test_a_cut_for_good_ends_both_in_time_and_the_run_goes_on_later(
    tmp_path: Path, two: Hosts, tmp_path_factory: pytest.TempPathFactory
) -> None:
    job = Job(tmp_path, two, PIPELINE, static=True)
    started = job.start_all("--max-restarts", "0")
    job.await_step(6, saved=True)
    two.cut("host-b")
    began = time.monotonic()
    codes = job.all_end(started)
    seconds = time.monotonic() - began
    reached, newest = job.reached(), job.newest_checkpoint()
    assert 0 not in codes
    assert "the hosts host-a and host-b do not reach each other" in job.logs()
    two.mend("host-b")
    assert job.all_end(job.start_all()) == [0, 0], job.logs()
    assert losses_of(job.metrics) == calm(tmp_path_factory, PIPELINE)
    (resumed,) = job.resumed_from()
    assert resumed == newest
    assert 4 <= resumed <= reached
    note(
        job,
        "PP 2",
        "host-b disconnected permanently; all hosts restarted",
        reached - resumed,
        seconds,
    )


@pytest.mark.slow
def test_four_hosts_lose_one(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two stages by two replicas; the cut-off host is named, dies, and comes back."""
    layout = (PIPELINE, "training.global_batch_size=8")
    with Hosts("host-a", "host-b", "host-c", "host-d") as hosts:
        job = Job(tmp_path, hosts, *layout, static=False)
        started = job.start_all("--max-restarts", "3")
        job.await_step(6, saved=True)
        hosts.cut("host-c")
        began = time.monotonic()
        named = "host host-c is cut off: no connection to host-a, host-b, host-d"
        await_that(lambda: named in job.logs(), END, f"a verdict:\n{job.logs()}")
        seconds = time.monotonic() - began
        hosts.power_off("host-c")
        reached, newest = job.reached(), job.newest_checkpoint()
        hosts.mend("host-c")
        started[2] = job.start("host-c", "--max-restarts", "3")
        assert job.all_end(started) == [0] * 4, job.logs()
        assert losses_of(job.metrics) == calm(tmp_path_factory, *layout)
        resumed = job.resumed_from()[0]
        assert resumed == newest
        assert 4 <= resumed <= reached
        note(
            job, "PP 2 x DP 2", "host-c disconnected, then powered off", reached - resumed, seconds
        )


@pytest.mark.slow
def test_sigusr1_on_one_host_saves_on_all(tmp_path: Path, two: Hosts) -> None:
    """Handed on by its launcher: both end with 75, which torchrun itself would make 0."""
    job = Job(tmp_path, two, PIPELINE, static=False)
    started = job.start_all()
    job.await_step(3)
    # ip and unshare have become the launcher itself.
    os.kill(started[1].pid, signal.SIGUSR1)
    assert job.all_end(started) == [75, 75], job.logs()
    assert "checkpoint written" in job.log("host-a")


@pytest.mark.slow
def test_a_node_that_is_not_like_the_others_is_told_before_training(
    tmp_path: Path, two: Hosts
) -> None:
    """Another setting, another layout even, and a folder that is not shared."""
    job = Job(tmp_path, two, PIPELINE, static=True)
    first = job.start("host-a", "--max-restarts", "0")
    job.settings = [f"training.steps={STEPS}", DATA, "training.seed=5"]
    second = job.start("host-b", "--max-restarts", "0")
    assert 0 not in job.all_end([first, second])
    log = job.log("host-a")
    assert "the nodes differ; compared with host host-a, which has rank 0" in log
    assert "host host-b: parallel.pipeline is 1, not 2; training.seed is 5, not 1234" in log
    assert log.count("the nodes differ") == 1
    assert not job.metrics.exists()

    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "run.yaml").write_text((tmp_path / "run.yaml").read_text())
    job.settings = [f"training.steps={STEPS}", PIPELINE]
    other = Job(alone, two, PIPELINE, static=True)
    started = [job.start("host-a", "--max-restarts", "0")]
    started.append(other.start("host-b", "--max-restarts", "0"))
    assert 0 not in job.all_end(started)
    expected = (
        "training.runs_dir: .*/alone/runs on host host-b|training.runs_dir: .* on host host-b"
    )
    assert re.search(expected, job.log("host-a").split("the nodes differ")[-1])
    assert "it must be one folder that all nodes share" in job.log("host-a")


@pytest.mark.slow
def test_a_rendezvous_that_nobody_answers_is_told(tmp_path: Path, two: Hosts) -> None:
    job = Job(tmp_path, two, PIPELINE, static=True)
    alone = job.start("host-b", WAIT_SECONDS="2")
    assert job.all_end([alone]) == [2]
    assert "no answer from host-a port 29500 in 2 s, seen from host-b" in job.log("host-b")
    config = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert config["training"]["name"] == "test"
