"""End real training runs in every supported way, and check their status in MLflow.

python tools/run_endings.py                       # all of them, to docs/benchmarks/endings.md
python tools/run_endings.py --only "kill -9"      # cases whose name contains this; only printed

tests/integration/test_ends.py runs the same cases.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from keel_megatron.tracking.metrics import read_metrics

PAGE = ROOT / "docs" / "benchmarks" / "endings.md"
PATIENCE = 300.0
SMALL_FILE_BYTES = 300_000
"""More than log.txt and metrics.jsonl come to, less than a checkpoint's file."""
DROPPED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Started:
    """A run that is at work, in a process of its own."""

    def __init__(self, home: Path, launcher: str, overrides: tuple[str, ...]) -> None:
        self.home = home
        self.folder = home / "runs" / "test"
        self.launcher = launcher
        self.overrides = overrides
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        keel = ["-m", "keel_megatron", "train", "run.yaml", *self.overrides]
        kind, *options = self.launcher.split()
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = {
            "alone": [*keel, "--processes", "1"],
            "keel": [*keel, "--processes", "2", *options],
            "torchrun": [*torchrun, *options, *keel],
        }[kind]
        environment = {name: value for name, value in os.environ.items() if name not in DROPPED}
        environment["PYTHONPATH"] = str(ROOT)
        with (self.home / "output.txt").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=self.home,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            return any(m["step"] >= step for m in read_metrics(self.folder / "metrics.jsonl"))

        self._wait(lambda: reached() or self.process.poll() is not None, f"step {step}")

    def wait_for_end(self) -> int:
        code = self.process.wait(PATIENCE)
        self._wait(lambda: not self.workers(), "the MLflow worker's end")
        return code

    def rank(self, rank: int) -> psutil.Process:
        if self.launcher == "alone":
            return psutil.Process(self.process.pid)
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(rank):
                return child
        raise RuntimeError(f"no rank {rank}")

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
                mine = "keel_megatron.mlflow_delivery.worker" in command
                if mine and process.cwd() == str(self.home):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """End whatever is left."""
        for process in [*self.workers(), *_family(self.process.pid)]:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait(30)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                output = (self.home / "output.txt").read_text(errors="replace")
                raise RuntimeError(f"{what} did not come:\n{output[-3000:]}")
            time.sleep(0.02)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.Error:
        return []


@dataclass(frozen=True)
class Case:
    """One way of ending."""

    name: str
    launcher: str
    """alone, keel (its own launcher) or torchrun, and its options."""
    expected: tuple[int, str]
    """The command's exit code, and the run's status in MLflow; - = it has no run."""
    act: Callable[[Started], None] = lambda _run: None
    steps: int = 2000
    overrides: tuple[str, ...] = ()
    resumed: int = 0
    """Number of resumes of the MLflow run, by its tags."""


def at(step: int, act: Callable[[Started], None]) -> Callable[[Started], None]:
    def whole(run: Started) -> None:
        run.wait_for_step(step)
        act(run)

    return whole


def send(*numbers: int, rank: int | None = None) -> Callable[[Started], None]:
    """Send signals to a rank, or to the command itself."""

    def act(run: Started) -> None:
        target = psutil.Process(run.process.pid) if rank is None else run.rank(rank)
        for number in numbers:
            target.send_signal(number)

    return act


def fill_disk(run: Started) -> None:
    limit = (SMALL_FILE_BYTES, resource.RLIM_INFINITY)
    resource.prlimit(run.rank(0).pid, resource.RLIMIT_FSIZE, limit)
    run.wait_for_step(12)


def lose_node(run: Started) -> None:
    """Everything of it is gone at once; later somebody asks what became of the run."""
    run.kill()
    keel = [sys.executable, "-m", "keel_megatron", "track", "sync", str(run.folder)]
    subprocess.run(keel, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def lose_node_and_start_again(run: Started) -> None:
    run.kill()
    run.process = run.start()


def damage_and_start_again(run: Started) -> None:
    run.process.send_signal(signal.SIGTERM)
    run.wait_for_end()
    for path in (run.folder / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    run.process = run.start()


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
HANG = ("training.hang_timeout=8",)
SPIKES = ("optimizer.learning_rate=1e30", "optimizer.clip_grad=0.0", "guard.limit=2")
ON = ("checkpoint.every=4",)

CASES = [
    Case("all steps done", "alone", (0, "FINISHED"), steps=4),
    Case("SIGTERM", "alone", (143, "KILLED"), at(3, send(signal.SIGTERM))),
    Case("SIGINT (Ctrl-C)", "alone", (130, "KILLED"), at(3, send(signal.SIGINT))),
    Case("SIGUSR1", "alone", (75, "KILLED"), at(3, send(signal.SIGUSR1))),
    Case("a second SIGINT while it stops", "alone", (130, "KILLED"), at(3, send(2, STOP, 2, 18))),
    Case("training.exit_after", "alone", (75, "KILLED"), overrides=("training.exit_after=0.1",)),
    Case("kill -9", "alone", (-9, "FAILED"), at(3, send(KILL))),
    Case("kill -9 of rank 0, no restart", "keel", (137, "FAILED"), at(3, send(KILL, rank=0))),
    Case("kill -9 of rank 1, no restart", "keel", (137, "FAILED"), at(3, send(KILL, rank=1))),
    Case(
        "kill -9 of rank 0, restarted",
        "keel --max-restarts 1",
        (0, "FINISHED"),
        at(6, send(KILL, rank=0)),
        40,
        ON,
        resumed=1,
    ),
    Case("kill -9 of rank 0, no restart", "torchrun", (1, "FAILED"), at(3, send(KILL, rank=0))),
    Case("kill -9 of rank 1, no restart", "torchrun", (1, "FAILED"), at(3, send(KILL, rank=1))),
    Case(
        "kill -9 of rank 1, restarted",
        "torchrun --max-restarts=1",
        (0, "FINISHED"),
        at(6, send(KILL, rank=1)),
        40,
        ON,
        resumed=1,
    ),
    Case(
        "kill -9 before the first checkpoint, restarted",
        "keel --max-restarts 1",
        (0, "FINISHED"),
        at(2, send(KILL, rank=1)),
        30,
        resumed=1,
    ),
    Case(
        "rank 0 hangs, watchdog", "keel", (70, "FAILED"), at(3, send(STOP, rank=0)), overrides=HANG
    ),
    Case(
        "rank 1 hangs, watchdog", "keel", (70, "FAILED"), at(3, send(STOP, rank=1)), overrides=HANG
    ),
    Case(
        "not finite, guard.limit of skips",
        "alone",
        (65, "FAILED"),
        overrides=(*SPIKES, "guard.action=skip"),
    ),
    Case(
        "not finite, guard.limit of rollbacks",
        "alone",
        (65, "FAILED"),
        overrides=(*SPIKES, "guard.action=rollback"),
        resumed=2,
    ),
    Case("disk full at a save", "alone", (2, "FAILED"), at(5, fill_disk), 2000, ON),
    Case(
        "every checkpoint damaged: refused; the earlier status is kept",
        "alone",
        (2, "KILLED"),
        at(3, damage_and_start_again),
    ),
    Case("user's error: no such text", "alone", (2, "-"), overrides=("data.text=/nowhere.txt",)),
    Case("user's error: configuration", "alone", (2, "-"), overrides=("model.blocks=0",)),
    Case("node lost, then `keel track sync`", "alone", (-9, "FAILED"), at(3, lose_node)),
    Case(
        "node lost, restarted",
        "alone",
        (0, "FINISHED"),
        at(6, lose_node_and_start_again),
        40,
        ON,
        resumed=1,
    ),
]


@dataclass
class Ending:
    """What became of a case."""

    code: int
    statuses: list[str] = field(default_factory=list)
    resumed: int = 0
    synced: bool = False
    """Whether the run said that something waits, and `keel track sync` delivered it."""
    doubled: int = 0
    """Steps of which MLflow has several losses that differ."""

    def is_as_expected(self, case: Case) -> bool:
        code, status = case.expected
        runs = [] if status == "-" else [status]
        return (self.code, self.statuses, self.resumed, self.doubled) == (
            code,
            runs,
            case.resumed,
            0,
        )


def run_case(case: Case, home: Path, data: Path) -> Ending:
    """End a run this way, in a folder of its own.

    Args:
        case: the way.
        home: folder of the run, new.
        data: prepared data that the cases share.
    """
    home.mkdir(parents=True, exist_ok=True)
    home = home.resolve()
    (home / "run.yaml").write_text(yaml.safe_dump(_sections(case, data)))
    run = Started(home, case.launcher, case.overrides)
    try:
        case.act(run)
        code = run.wait_for_end()
    finally:
        run.kill()
    return _ending(code, run.folder)


def _sections(case: Case, data: Path) -> dict[str, Any]:
    from tests.settings import settings

    return settings(
        data__text=argparse.__file__,
        data__cache_dir=str(data),
        training__steps=case.steps,
        training__validation_sequences=4,
        training__global_batch_size=4,
        training__micro_batch_size=1,
        tracking__mlflow=True,
        tracking__system_metrics_every=1.0,
        tracking__depth_every=0,
        checkpoint__every=0,
        parallel__pipeline=1 if case.launcher == "alone" else 2,
    )


def _ending(code: int, folder: Path) -> Ending:
    from mlflow import MlflowClient

    from keel_megatron.mlflow_delivery.outbox_reader import Waiting
    from keel_megatron.mlflow_delivery.sync import sync

    if not (folder / "outbox").is_dir():
        return Ending(code)
    late = Waiting.of(folder).status is not None  # more than 30 s, on a busy machine
    if late:
        sync(folder)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("keel")
    named = f"attributes.run_name = '{folder.name}'"
    runs = client.search_runs([experiment.experiment_id], named, order_by=["start_time ASC"])
    ending = Ending(code, [run.info.status for run in runs], synced=late)
    for run in runs:
        ending.resumed += sum(name.startswith("resumed.") for name in run.data.tags)
        points = client.get_metric_history(run.info.run_id, "train/loss")
        losses = {(point.step, point.value) for point in points}
        ending.doubled += len(losses) - len({step for step, _ in losses})
    return ending


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="cases whose name has this in it; no page is written")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="endings-"))
    lines = [
        "# How runs end, and their final status in MLflow",
        "",
        f"`python tools/run_endings.py`, {os.cpu_count()} cores, {date.today()}: runs of a small "
        "model, each ended in",
        "another way. code: exit code of the command (-9: the command itself was killed). Every",
        "case has one MLflow run; resumed: how often it was resumed.",
        "",
        "| end | launcher | code | status | resumed | |",
        "|---|---|---|---|---|---|",
    ]
    wrong = 0
    for number, case in enumerate(CASES):
        if arguments.only and arguments.only not in case.name:
            continue
        ending = run_case(case, home / str(number), home / "data")
        good = ending.is_as_expected(case)
        wrong += not good
        shown = ", ".join(ending.statuses) or "no run"
        remark = "after `keel track sync`" if ending.synced else ""
        remark = remark if good else f"WRONG: expected {case.expected}, {ending}"
        lines.append(
            f"| {case.name} | {case.launcher} | {ending.code} | {shown} | {ending.resumed} "
            f"| {remark} |"
        )
        print(lines[-1], flush=True)
    if not arguments.only:
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{wrong} wrong; runs in {home}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
