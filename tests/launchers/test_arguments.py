"""Every setting arrives at every rank byte for byte, and no shell on the way reads it as code."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import yaml
from keel_megatron.cli.main import app
from keel_megatron.runtime import local_launch
from tests.integration.commands import write_config
from tests.launchers.test_launchers import DEMO, LAUNCHERS, launch
from tests.launchers.test_slurm import SCONTROL, SRUN
from tests.ports import reserved_port

pytestmark = pytest.mark.security

NASTY = (
    'costs $5 and `touch mark` or "x"',
    "a;touch${IFS}mark",
    "$(touch mark)$((1+1))",
    "$$ ${local_rank} $local_rank $(NNODES) $$(NNODES) $",
    "%h %n %u %% %",
    "it's 'quoted' \"twice\"",
    "back\\slash \\\\ \\n \\",
    "two\nlines\n",
    "  spaces  \t tab ",
    "* ? [a-z] ~ ~root {a,b}",
    "<in >out | cat & touch mark ; # !!",
    "--help",
    "-oProxyCommand=touch mark",
    "größer ∞ 🙂",
    "\x01\x1b[2J",
    "",
)
SLOW = {"timeout": 300.0}
SETTINGS = [f"data.value_{number}={value}" for number, value in enumerate(NASTY)]
# In place of the package: every rank notes what it was started with.
RANK = """
import json, os, sys
if sys.argv[1] == "config":
    print("runs/x")
    sys.exit()
parent = open(f"/proc/{os.getppid()}/cmdline").read()
place = f"{os.environ['NOTES']}/{os.environ['RANK']}.{os.getpid()}"
with open(place, "w") as notes:
    json.dump([sys.argv[1:], dict(os.environ), parent], notes)
"""
PDSH = """#!/usr/bin/env bash
# As pdsh: its own letters in the command, which every host's shell reads.
printf '%s\\n' "$@" >>"$LOG"
while [[ $1 != -w ]]; do shift; done
IFS=, read -ra hosts <<<"$2"
shift 2
command="$*"
number=0
for host in "${hosts[@]}"; do
    with=${command//%n/$number}
    sh -c "${with//%h/$host}" &
    number=$((number + 1))
done
wait
"""
SSH = """#!/usr/bin/env bash
printf '%s\\n' "$@" >>"$LOG"
while [[ $1 == -o ]]; do shift 2; done
[[ $1 != -- ]] || shift
shift
sh -c "$*"
"""


def stand_ins(folder: Path, **scripts: str) -> Path:
    """A folder for PATH with these programs."""
    (folder / "bin").mkdir()
    for name, text in scripts.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder / "bin"


def recorded(folder: Path) -> dict[str, str]:
    """Variables under which ranks are recorded, not run."""
    package = folder / "python" / "keel_megatron"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(RANK)
    (folder / "notes").mkdir()
    (folder / "run.yaml").write_text("a: b\n")
    (folder / "log").touch()
    return {
        "PYTHONPATH": str(folder / "python"),
        "NOTES": str(folder / "notes"),
        "LOG": str(folder / "log"),
    }


def ranks(folder: Path) -> list[tuple[list[str], dict[str, str], str]]:
    """What each has noted: its arguments, its environment, its parent's command line."""
    notes = sorted((folder / "notes").iterdir(), key=lambda path: path.name)
    return [tuple(json.loads(path.read_text())) for path in notes]


def test_slurm_and_torchrun(tmp_path: Path) -> None:
    path = stand_ins(tmp_path, srun=SRUN, scontrol=SCONTROL)
    variables = recorded(tmp_path) | {
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "NPROC_PER_NODE": "1",
        "CALLS": str(tmp_path / "calls"),
    }
    with reserved_port() as port:
        variables["SLURM_JOB_ID"] = str(port - 20_000)
        arguments = ["run.yaml", *SETTINGS]
        done = launch("slurm.sbatch", *arguments, folder=tmp_path, path=path, **SLOW, **variables)
    assert done.returncode == 0, done.stderr
    started = ranks(tmp_path)
    assert [arguments for arguments, _env, _parent in started] == [
        ["train", "run.yaml", *SETTINGS]
    ] * 2
    # The rendezvous' name is random, and neither printed nor in `ps`.
    (name,) = {env["RDZV_ID"] for _arguments, env, _parent in started}
    assert re.fullmatch("[0-9a-f]{32}", name)
    assert started[0][1]["TORCHELASTIC_RUN_ID"] == name
    assert all(name not in parent and "torch.distributed.run" in parent for *_, parent in started)
    # Where one node ends before the other, torch warns once the rendezvous is over, with its name.
    over = "has failed to shutdown the rendezvous"
    said = [one for one in (done.stdout + done.stderr).splitlines() if over not in one]
    assert name not in "\n".join(said)
    assert not list(tmp_path.rglob("mark"))


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="no DeepSpeed"
)
needs_plain_path = pytest.mark.skipif(
    re.fullmatch(r"[A-Za-z0-9_@+=:,./-]+", str(LAUNCHERS)) is None,
    reason="launchers/deepspeed.sh refuses a repository in such a path",
)


@needs_deepspeed
@needs_plain_path
def test_deepspeed_over_ssh_and_its_secrets(tmp_path: Path) -> None:
    secrets = {
        "MLFLOW_TRACKING_USERNAME": "sesame-name",
        "MLFLOW_TRACKING_PASSWORD": 'sesame $(touch mark) "\n',
        "AWS_SECRET_ACCESS_KEY": "sesame-key",
    }
    path = stand_ins(tmp_path, pdsh=PDSH, ssh=SSH)
    (tmp_path / "hostfile").write_text("host-a slots=1\nhost-b slots=1\n")
    variables = recorded(tmp_path) | secrets | {"MASTER_ADDR": "127.0.0.1", "TMPDIR": str(tmp_path)}
    arguments = ["run.yaml", *SETTINGS]
    done = launch("deepspeed.sh", *arguments, folder=tmp_path, path=path, **SLOW, **variables)
    assert done.returncode == 0, done.stderr
    first, second = ranks(tmp_path)
    assert first[0] == second[0] == ["train", *arguments]
    # Rank 0 alone reports, and so has them; nobody sees them on their way.
    assert secrets.items() <= first[1].items()
    assert not secrets.keys() & second[1].keys()
    seen = done.stdout + done.stderr + (tmp_path / "log").read_text() + first[2] + second[2]
    assert "sesame" not in seen
    assert not list(tmp_path.glob("tmp.*"))  # read and removed
    assert not list(tmp_path.rglob("mark"))


@needs_plain_path
@pytest.mark.parametrize(
    ("line", "variables", "message"),
    [
        ("-oProxyCommand=touch${IFS}mark slots=2", {}, "a line is HOST slots=N"),
        ("host;touch${IFS}mark slots=2", {}, "a line is HOST slots=N"),
        ("$(touch${IFS}mark) slots=2", {}, "a line is HOST slots=N"),
        ("host-[1-2] slots=2", {}, "a line is HOST slots=N"),
        ("host-a slots=2", {"MASTER_ADDR": "a;touch${IFS}mark"}, "is not an address"),
        ("host-a slots=2", {"MASTER_PORT": "1;touch${IFS}mark"}, "must be a port number"),
        ("host-a slots=2", {"NCCL_DEBUG": "$(touch mark)"}, "NCCL_DEBUG: DeepSpeed passes it to"),
    ],
)
def test_what_a_remote_shell_would_run_is_refused(
    tmp_path: Path, line: str, variables: dict[str, str], message: str
) -> None:
    path = stand_ins(tmp_path, pdsh=PDSH, ssh=SSH)
    (tmp_path / "hostfile").write_text(f"{line}\n")
    variables = recorded(tmp_path) | variables
    done = launch("deepspeed.sh", "run.yaml", folder=tmp_path, path=path, **variables)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr or "not installed" in done.stderr
    assert not (tmp_path / "mark").exists()
    assert (tmp_path / "log").read_text() == ""


@needs_deepspeed
def test_a_folder_that_a_remote_shell_would_run_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a$(touch mark)"
    folder.mkdir()
    (folder / "hostfile").write_text("host-a slots=1\n")
    done = launch("deepspeed.sh", "run.yaml", folder=folder, **recorded(folder))
    assert done.returncode == 2
    assert "the current folder is " in done.stderr


def test_a_rendezvous_endpoint_is_no_code(tmp_path: Path) -> None:
    meeting = {"NNODES": "2", "NODE_RANK": "1", "RDZV_ID": "x", "WAIT_SECONDS": "1"}
    attacks = [
        {"RDZV_ENDPOINT": "x$(touch${IFS}mark)y:29500"},
        {"RDZV_ENDPOINT": "x:a[$(touch mark)]"},
        {"RDZV_ENDPOINT": "127.0.0.1:1", "WAIT_SECONDS": "a[$(touch mark)]"},
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "a[$(touch mark)]"},
    ]
    variables = recorded(tmp_path)
    for attack in attacks:
        done = launch("torchrun.sh", "run.yaml", folder=tmp_path, **variables | meeting | attack)
        assert done.returncode == 2, done.stderr
        assert not (tmp_path / "mark").exists(), attack


@needs_plain_path
@pytest.mark.parametrize(
    ("left", "code"),
    [
        ("", 1),
        ("75\n", 75),
        ("0", 0),
        ("PATH[$(touch mark)]", 1),
        ("256", 1),
        ("-1", 1),
        ("1e3", 1),
    ],
)
def test_an_exit_code_is_a_number(tmp_path: Path, left: str, code: int) -> None:
    (tmp_path / "exit_code").write_text(left)
    script = f"source {LAUNCHERS}/lib.sh; RUN_FOLDER=$PWD; exit $(saved_code)"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, timeout=20)
    assert done.returncode == code
    assert not (tmp_path / "mark").exists()


def test_launchers_show_no_secrets() -> None:
    overrides = [
        "tracking.uri=https://user:pass-sesame@host/a?api_key=sesame#token=sesame",
        "tracking.uri=postgresql://user:p/sesame?@host/x",
        "tracking.password=sesame",
        "data.text=/some/text",
    ]
    for name, variables in (("torchrun.sh", {}), ("slurm.sbatch", {}), ("local.sh", {})):
        first = ["2"] if name == "local.sh" else []
        done = launch(name, "--dry-run", *first, DEMO, *overrides, **variables)
        assert done.returncode == 0, done.stderr
        assert "sesame" not in done.stdout
        assert r"tracking.uri=https://\*\*\*@host/a\?\*\*\*" in done.stdout
        assert "data.text=/some/text" in done.stdout
    done = launch("torchrun.sh", DEMO, "https://user:sesame@host")
    assert "sesame" not in done.stderr


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_processes_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The command's settings go to the ranks as they are, and the ranks have them so."""
    config = write_config(tmp_path, Path(argparse.__file__))
    commands: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    for place in (local_launch, sys.modules["keel_megatron.cli.train"]):
        monkeypatch.setattr(place, "launch", lambda _n, command, *_, **_k: commands.append(command))
    prompts = [f"tracking.sample_prompt='{value}'" for value in NASTY if value.isprintable()]
    prompts = [prompt for prompt in prompts if prompt.count("'") == 2]
    prompts.append("parallel.pipeline=2")
    done = CliRunner().invoke(app, [verb, str(config), *prompts, "--processes", "2"])
    assert done.exit_code == 0, done.output
    assert commands == [["-m", "keel_megatron", verb, str(config), *prompts]]


def test_the_local_launcher_starts_no_shell(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(
        "import sys, pathlib\npathlib.Path(sys.argv[1]).write_text(repr(sys.argv[2:]))"
    )
    note = tmp_path / "note"
    assert local_launch.launch(1, [str(tmp_path / "rank.py"), str(note), *SETTINGS]) == 0
    assert note.read_text() == repr(SETTINGS)


def render() -> ModuleType:
    """launchers/kubernetes/render.py, which is no package's."""
    spec = importlib.util.spec_from_file_location("render", LAUNCHERS / "kubernetes" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expanded(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of an argument: $$ is $, $(NAME) a known variable's value."""
    known = "|".join(map(re.escape, variables))
    return re.sub(
        rf"\$\$|\$\(({known})\)", lambda found: variables[found[1]] if found[1] else "$", text
    )


@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_kubernetes(kind: str, value: str) -> None:
    module = render()
    setting = f"data.value=$(NNODES){value}"
    objects = module.render(kind, "n", "i", 2, 0, "c", "s", "a: b\n", [setting])
    text = yaml.dump_all(objects, Dumper=module._Dumper, sort_keys=False)
    job = next(e for e in yaml.safe_load_all(text) if e["kind"] in ("Job", "PyTorchJob"))["spec"]
    template = (
        job["template"] if kind == "job" else job["pytorchReplicaSpecs"]["Master"]["template"]
    )
    (argument,) = template["spec"]["containers"][0]["args"]
    assert expanded(argument, {"NNODES": "2"}) == setting


def test_kubernetes_from_the_command_line() -> None:
    done = launch("kubernetes.sh", "--dry-run", DEMO, *SETTINGS)
    text = done.stdout.partition("\n+ kubectl apply --filename -\n")[2]
    job = next(entry for entry in yaml.safe_load_all(text) if entry["kind"] == "Job")
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [expanded(a, {"NNODES": "2"}) for a in arguments[-len(SETTINGS) :]] == SETTINGS
