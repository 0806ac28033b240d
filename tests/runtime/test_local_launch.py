"""The local launcher: exit codes survive, what failed is started again, what hangs is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keel_megatron.cli import config, main
from keel_megatron.runtime import exit_codes, local_launch
from tests.hosts import await_that

# A rank that does in start N what its N-th argument says for it, such as "0=exit75,1=exit0".
RANK = """
import os, signal, sys, time
restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank = os.environ["RANK"]
act = dict(pair.split("=") for pair in sys.argv[1 + restart].split(","))[rank]
open(f"start_{restart}_{rank}", "w").close()
for _ in range(30_000):
    if all(os.path.exists(f"start_{restart}_{other}") for other in "01"):
        break
    time.sleep(0.01)
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "freeze":
    os.kill(os.getpid(), signal.SIGSTOP)
if act == "wait":
    time.sleep(600)
sys.exit(int(act.removeprefix("exit")))
"""


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("starts", "restarts", "expected"),
    [
        (["0=exit0,1=exit0"], 3, 0),
        (["0=exit3,1=exit0"], 0, 3),
        (["0=exit1,1=kill"], 0, 137),  # the cause, not its consequence
        (["0=exit1,1=kill", "0=exit0,1=exit0"], 3, 0),
        (["0=exit70,1=freeze", "0=exit0,1=exit0"], 1, 0),
        (["0=wait,1=exit1", "0=exit1,1=wait", "0=exit4,1=exit4"], 2, 4),
        (["0=exit75,1=exit75"], 3, 75),  # saved on purpose
        (["0=exit65,1=exit65"], 3, 65),  # it would diverge again
        (["0=exit1,1=exit2"], 3, 2),  # only the user can mend it
    ],
)
def test_codes_and_restarts(
    starts: list[str], restarts: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a rank has to be ended the waits for it are short; else they are until it ends."""
    lasting = any(act in start for start in starts for act in ("wait", "freeze"))
    monkeypatch.setattr(local_launch, "SETTLE_SECONDS", 0.3 if lasting else 300.0)
    monkeypatch.setattr(local_launch, "GRACE_SECONDS", 0.5 if lasting else 300.0)
    code = local_launch.launch(2, ["-c", RANK, *starts], restarts)
    assert code == expected
    made = {path.name for path in Path().glob("start_*")}
    assert made == {f"start_{n}_{rank}" for n in range(len(starts)) for rank in range(2)}


def test_a_signal_reaches_every_rank_once_and_nothing_starts_again(tmp_path: Path) -> None:
    rank = """
import signal, time, sys, pathlib, os
def note(number, frame):
    with open("got_" + os.environ["RANK"], "a") as f: f.write(f"{number} ")
signal.signal(signal.SIGUSR1, note)
pathlib.Path("ready_" + os.environ["RANK"]).touch()
for _ in range(30_000):
    if all(pathlib.Path(f"got_{rank}").exists() for rank in (0, 1)): break
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(1)
"""
    code = (
        f"import sys; from {local_launch.__name__} import launch; "
        f"sys.exit(launch(2, ['-c', {rank!r}], 5))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        await_that(lambda: len(list(tmp_path.glob("ready_*"))) == 2, 300, "two ranks")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=300) == 1
    for number in range(2):
        assert (tmp_path / f"got_{number}").read_text() == f"{int(signal.SIGUSR1)} "


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    """Its ranks, of any command, are sent SIGTERM; a run then saves (training/stop.py)."""
    rank = f"""
import os, pathlib, signal, sys, time
from {main.__name__} import main
def note(number, frame):
    pathlib.Path("ended_" + os.environ["RANK"]).touch()
    raise SystemExit(0)
def work():
    signal.signal(signal.SIGTERM, note)
    pathlib.Path("ready_" + os.environ["RANK"]).touch()
    time.sleep(600)
sys.modules[{config.__name__!r}].bundled_names = work
sys.argv = ["keel", "config", "list"]
main()
"""
    code = f"from {local_launch.__name__} import launch; launch(2, ['-c', {rank!r}])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        await_that(lambda: len(list(tmp_path.glob("ready_*"))) == 2, 300, "two ranks")
        process.kill()
    await_that(lambda: len(list(tmp_path.glob("ended_*"))) == 2, 300, "their ends")


@pytest.mark.parametrize("saves", [False, True])
def test_after_ctrl_c_only_a_command_that_saves_is_given_time(
    saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank in C++ code that waits for one that has ended does not hear it."""
    rank = """
import os, pathlib, signal, time
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
else:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
pathlib.Path("ready_" + os.environ["RANK"]).touch()
time.sleep(600)
"""
    waits = {"SETTLE_SECONDS": 600.0 if saves else 0.1, "LEAVE_SECONDS": 0.1 if saves else 600.0}
    for name, seconds in waits.items():
        monkeypatch.setattr(local_launch, name, seconds)

    def interrupt() -> None:
        await_that(lambda: len(list(Path().glob("ready_*"))) == 2, 300, "two ranks")
        os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(interrupt)
        assert local_launch.launch(2, ["-c", rank], saves=saves) == 130
        asked.result()


def test_torchrun_is_told_that_a_saved_run_succeeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would start it again; without restarts it gets the truth."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert [exit_codes.for_torchrun(code) for code in (0, 65, 75, 130, 143)] == [0, 0, 0, 0, 0]
    assert [exit_codes.for_torchrun(code) for code in (1, 2, 70)] == [1, 2, 70]
    for none in ("0", ""):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", none)
        assert [exit_codes.for_torchrun(code) for code in (0, 75, 2)] == [0, 75, 2]


def test_ranks_get_python_s_own_modules_and_the_launcher_s_package(tmp_path: Path) -> None:
    """Whatever lies in the working directory."""
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "keel_megatron").mkdir()
    (tmp_path / "keel_megatron" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    assert local_launch.launch(2, ["-c", "import queue, keel_megatron.runtime.parent"]) == 0


def test_ranks_meet_where_no_other_machine_can_come(tmp_path: Path) -> None:
    """Rank 0 opens the store at the launcher's port; the launcher needs no torch for it."""
    rank = """
import os, pathlib, psutil, torch.distributed as dist
from keel_megatron.runtime.rendezvous import shared_store
rank = int(os.environ["RANK"])
store = shared_store(60.0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
found = [None, None]
dist.all_gather_object(found, rank)
listening = {c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"}
pathlib.Path(f"met_{rank}").write_text(f"{found} {listening}")
dist.barrier()
dist.destroy_process_group()
"""
    assert local_launch.launch(2, ["-c", rank]) == 0
    for number in range(2):
        assert (tmp_path / f"met_{number}").read_text() == "[0, 1] {'127.0.0.1'}"


def test_a_group_that_died_of_the_request_to_save_is_saved(tmp_path: Path) -> None:
    """It was still starting: nothing was trained, and a scheduler is to submit the job again."""
    rank = """
import os, pathlib, time
pathlib.Path("ready_" + os.environ["RANK"]).touch()
time.sleep(60)
"""
    code = (
        f"import sys; from {local_launch.__name__} import launch; "
        f"sys.exit(launch(2, ['-c', {rank!r}]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        await_that(lambda: len(list(tmp_path.glob("ready_*"))) == 2, 60, "two ranks")
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == exit_codes.SAVED
