"""One owner of a run's folder: who is kept out, how long, and what is left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from keel_megatron.config import UserError
from keel_megatron.runtime import ownership
from keel_megatron.runtime.ownership import FILE, passed_on, take
from tests.hosts import await_that

HOLDER = """
import os, sys, subprocess, time
from pathlib import Path
from keel_megatron.runtime.ownership import PASSED_ON, take
owned = take(Path("run"))
if sys.argv[1:] == ["rank"]:
    code = '''
import os, sys, time
from pathlib import Path
from keel_megatron.runtime.ownership import passed_on
held = passed_on(Path("run"))
Path("rank").write_text(f"{os.getpid()} {held is not None}")
time.sleep(60)
'''
    environment = os.environ | {PASSED_ON: str(owned.descriptor)}
    subprocess.Popen(
        [sys.executable, "-c", code], env=environment, pass_fds=[owned.descriptor]
    )
Path("holds").touch()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ownership, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 0.1)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


def holder(*arguments: str) -> subprocess.Popen[bytes]:
    """Another process that owns ./run."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, *arguments], env=environment)
    await_that(lambda: Path("holds").exists() or process.poll() is not None, 60, "the holder")
    return process


def another_machine_s() -> None:
    """Make the folder one whose owner was on another machine, a moment ago."""
    Path("run").mkdir(exist_ok=True)
    owner = {"host": "far", "pid": 7, "since": "then", "machine": "m", "pids": ""}
    (Path("run") / FILE).write_text(json.dumps(owner | {"work": "trained"}))


def test_a_second_process_is_told_who_the_owner_is_until_it_is_killed() -> None:
    with holder() as first:
        with pytest.raises(UserError) as refused:
            take(Path("run"))
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert str(refused.value).startswith(
        f"run is being trained by process {first.pid} on host {os.uname().nodename} since 2"
    )
    assert str(refused.value).endswith("; stop it, or give this run another training.name")
    take(Path("run")).release()  # at once


def test_of_many_starts_at_once_one_owns_the_folder() -> None:
    barrier, owned, refused = threading.Barrier(8), [], []

    def start() -> None:
        barrier.wait()
        try:
            owned.append(take(Path("runs/run")))
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(owned), len(refused)) == (1, 7)
    owned[0].release()
    # Who made the folders is not known for sure among starts at once: empty ones may stay.
    assert not any(path.is_file() for path in Path().rglob("*"))


def test_a_killed_launcher_s_rank_still_owns_the_folder() -> None:
    with holder("rank") as launcher:
        await_that(lambda: Path("rank").exists() and Path("rank").read_text() != "", 60, "a rank")
        pid, holds = Path("rank").read_text().split()
        assert holds == "True"
        launcher.kill()
    rank = psutil.Process(int(pid))
    try:
        with pytest.raises(UserError, match=rf"ranks, started by process {launcher.pid} on host"):
            take(Path("run"))
    finally:
        rank.kill()
    await_that(lambda: not rank.is_running() or rank.status() == "zombie", 20, "its end")
    take(Path("run")).release()


def test_the_variable_alone_makes_no_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start inside a rank inherits it, but not the open file."""
    with take(Path("run")) as owned, Path("other").open("w") as other:
        for number in (other.fileno(), 999, ""):
            monkeypatch.setenv(ownership.PASSED_ON, str(number))
            assert passed_on(Path("run")) is None
        monkeypatch.setenv(ownership.PASSED_ON, str(owned.descriptor))
        assert passed_on(Path("elsewhere")) is None
        with pytest.raises(UserError, match="is being trained by process"):
            take(Path("run"))


def test_what_was_made_goes_unless_something_has_come_into_it() -> None:
    with take(Path("runs/a")):
        assert Path("runs/a", FILE).is_file()
    assert not Path("runs").exists()
    with take(Path("runs/a")):
        Path("runs/a/config.yaml").touch()
    assert [path.name for path in Path("runs/a").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_one_message(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    Path("run").mkdir()

    def refuse(path: Path, *_arguments: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"^training.runs_dir: cannot write the run's folder run: "):
        take(Path("run"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot write the run's folder"):
        take(Path("/proc/nothing/run"))


def test_another_machine_s_lease_is_watched_before_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 0.3)
    another_machine_s()
    begun = time.monotonic()
    take(Path("run")).release()
    assert time.monotonic() - begun >= 0.3
    assert "run was last owned by process 7 on host far; checking for 0.3 s" in (
        capsys.readouterr().err
    )
    another_machine_s()
    hour_ago = time.time() - 3600
    os.utime(Path("run") / FILE, (hour_ago, hour_ago))
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 60.0)
    take(Path("run")).release()  # without a wait


def test_another_machine_s_lease_that_is_renewed_is_respected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 60.0)
    another_machine_s()
    owner = threading.Timer(0.2, lambda: os.utime(Path("run") / FILE))
    owner.start()
    with pytest.raises(UserError, match="run is being trained by process 7 on host far since then"):
        take(Path("run"))
    owner.join()
    assert json.loads((Path("run") / FILE).read_text())["host"] == "far"


def test_the_owner_renews_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.02)
    with take(Path("run")):
        before = (Path("run") / FILE).stat().st_mtime_ns
        await_that(lambda: (Path("run") / FILE).stat().st_mtime_ns > before, 20, "a heartbeat")


def test_a_file_system_without_locks_has_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(ownership, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 0.4)
    with take(Path("run")), pytest.raises(UserError, match="is being trained by process"):
        take(Path("run"))
    with suppress(FileNotFoundError):
        assert not Path("run").exists()
    take(Path("run")).release()


def test_a_group_that_torchrun_starts_again_waits_for_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 20.0)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    first = take(Path("run"))
    threading.Timer(0.2, first.release).start()
    take(Path("run")).release()
