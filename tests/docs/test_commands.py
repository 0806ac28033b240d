"""Every command of the documents works as it stands there, or says why it is not tried.

What can run on a CPU runs, in a copy of the repository whose demo is small; a launcher for a
cluster shows what it would do (`--dry-run`). tests/docs/commands.py has the comments that say how.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import yaml
from keel_megatron.cli.main import app
from keel_megatron.config import load_config
from keel_megatron.config.run import RunConfig
from tests.docs.commands import ACTIVATE, PAGES, ROOT, Command, commands, inline

ALL = [command for page in PAGES for command in commands(page)]
RUN = [command for command in ALL if command.how in ("run", "slow", "dry-run")]
SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "blocks": 8,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    },
    "data": {"seq_length": 32, "vocab_size": 384, "text": "LICENSE"},
    "schedule": {"warmup_steps": 1},
    "training": {
        "steps": 2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "validate_every": 0,
        "validation_sequences": 4,
    },
    "tracking": {"mlflow": False, "depth_every": 0},
}
"""What makes the demo small, text and all."""
ENVIRONMENT = {
    "activate": 'VIRTUAL_ENV="$PWD/.venv"\nexport VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH"\n',
    "keel": f'#!/bin/sh\nexec "{sys.executable}" -m keel_megatron "$@"\n',
    "python": f'#!/bin/sh\nexec "{sys.executable}" "$@"\n',
}
"""Programs of the copy's .venv."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, as it is after `make setup` and with a small demo."""
    home = tmp_path_factory.mktemp("documents") / "keel-megatron"
    home.mkdir()
    for name in ("README.md", "LICENSE", "Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, home)
    for name in ("yaml", "launchers", "docker", "docs"):
        shutil.copytree(ROOT / name, home / name)
    for name in ("keel_megatron", "tools", "tests"):
        (home / name).symlink_to(ROOT / name)
    demo = home / "yaml" / "demo.yaml"
    sections = yaml.safe_load(demo.read_text())
    for name, values in SMALL.items():
        sections.setdefault(name, {}).update(values)
    demo.write_text(yaml.safe_dump(sections))
    for recipe in (home / "yaml" / "recipes").glob("*.yaml"):
        make_small(recipe)
    for name, text in ENVIRONMENT.items():
        program = home / ".venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    for name in (".venv/.installed", ".venv/validators/.installed"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).touch()  # newer than what they are made of
    return home


def make_small(recipe: Path) -> None:
    """A recipe that starts from the small demo; settings that it does not have stay absent."""
    sections = yaml.safe_load(recipe.read_text())
    for name, values in SMALL.items():
        found = sections[name]
        found.update({key: value for key, value in values.items() if key in found})
    sections["tracking"].update(SMALL["tracking"])
    recipe.write_text(yaml.safe_dump(sections))


def a_shell(home: Path) -> dict[str, str]:
    """The environment of somebody who has just cloned the repository."""
    mine = {Path(sys.executable).parent, Path(sys.prefix) / "bin"}
    path = [one for one in os.environ["PATH"].split(os.pathsep) if Path(one) not in mine]
    dropped = ("VIRTUAL_ENV", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PATH": os.pathsep.join(path), "PYTHONPATH": str(home)}


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, id=str(c), marks=[pytest.mark.slow] if c.how == "slow" else []) for c in RUN],
)
def test_a_command_does_what_it_says(command: Command, home: Path) -> None:
    active = f"{ACTIVATE} && " if command.active else ""
    done = subprocess.run(
        ["bash", "-c", active + command.line],
        cwd=home,
        env=a_shell(home),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command.line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "is complete" not in done.stdout, "a run of this name is there already"


_NAME = re.compile(r"'?[A-Z_]+=")


@pytest.mark.parametrize("command", ALL, ids=str)
def test_a_command_is_run_or_says_why_not(command: Command) -> None:
    assert command.how != "skip" or len(command.reason.split()) > 1
    check(command.text)
    if command.text.split()[0] == "keel":
        assert command.active, f"{command}: the page does not say how to call keel ({ACTIVATE})"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_exist(page: Path) -> None:
    for text in inline(page):
        check(text)


@pytest.mark.parametrize(
    "command", [c for c in RUN if c.text.startswith("keel train")], ids=lambda c: c.text
)
def test_what_is_trained_is_valid_and_a_run_of_its_own(command: Command, home: Path) -> None:
    """Also of those that only the slow tests run."""
    _keel, _train, config, *rest = shlex.split(command.line)
    processes = int(rest[rest.index("--processes") + 1]) if "--processes" in rest else None
    settings = [word for word in rest if "=" in word]
    load_config(home / config, settings, world_size=processes)
    words = shlex.split(command.text)
    if config in words:  # nor does it only work with a small demo
        given = [word for word in words if "=" in word]
        load_config(ROOT / config, given, world_size=processes)
    same = [c.line for c in RUN if c.page == command.page and c.text.startswith("keel train")]
    names = [_run_name(home, line) for line in same]
    assert len({*names, "demo"}) == len(names) + 1, "runs of one name (make train's is demo)"


def _run_name(home: Path, line: str) -> str:
    """The name that a command gives its run, or that its configuration does."""
    given = re.findall(r"training\.name=(\S+)", line)
    return given[-1] if given else load_config(home / shlex.split(line)[2]).training.name


def test_the_cluster_page_trains_on_the_data_that_it_prepares() -> None:
    """Its commands are only shown here, so what they need is compared."""
    page = [c for c in ALL if c.page == "docs/cluster.md"]
    (build,) = (c for c in page if c.text.startswith("keel data build"))
    data = {word for word in build.text.split() if word.startswith("data.")}
    trains = [c for c in page if "launchers/" in c.text and "--doctor" not in c.text]
    assert len(trains) >= 4
    assert len(data) == 2
    for command in trains:
        # A pod sees the shared folder as its working folder.
        assert data <= set(command.text.replace("/work/", "/shared/").split()), command


def check(text: str) -> None:
    """See that what a command names exists: targets, verbs, options, settings and files."""
    words = [word for word in shlex.split(text, comments=True) if not _NAME.match(word)]
    program = words[0]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), text
    if program.rpartition("/")[2] == "keel":
        check_keel(text, words[1:])
    for word in words:
        path = word.removeprefix("./")
        if path.startswith(("launchers/", "tools/", "yaml/", "tests/", "docker/")):
            assert (ROOT / path).exists() or path == "docker/.env", f"{text}: no {path}"
            if path.endswith(".py"):
                source = (ROOT / path).read_text()
                options = re.findall(r"--[a-z][a-z-]+", text.partition(path)[2])
                assert all(f'"{option}"' in source for option in options), text


def check_keel(text: str, words: list[str]) -> None:
    """The same for `keel`: its verb, options and settings."""
    verb: Any = typer.main.get_command(app)
    words = [word for word in re.sub(r"[\[\]]", " ", " ".join(words)).split() if word != "..."]
    while words and hasattr(verb, "commands") and not words[0].startswith("-"):
        if words[1:2] == ["|"]:  # several of one group's
            names = [name for name in words if name not in ("|", "RUN")]
            assert all(name in verb.commands for name in names), text
            return
        assert words[0] in verb.commands, text
        verb = verb.commands[words.pop(0)]
    if verb.context_settings.get("ignore_unknown_options"):  # another program's
        return
    known = {o for p in verb.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    assert set(re.findall(r"(?<!\S)--[a-z][a-z-]+", " ".join(words))) <= known, text
    for section, key in re.findall(r"(?<!\S)([a-z_]+)\.([a-z_0-9]+)=", " ".join(words)):
        if (section, key) != ("section", "key"):
            values: Any = RunConfig.model_fields[section].annotation
            assert key in values.model_fields, text


def test_a_page_without_a_word_on_its_commands_is_seen(tmp_path: Path) -> None:
    """What the checks are good for: each of these would be found."""
    for text in (
        "keel trein yaml/demo.yaml",
        "keel train yaml/demo.yaml --process 2",
        "keel train yaml/demo.yaml model.block=3",
        "make everything",
        "python tools/no_such.py",
        "python tools/simulator_check.py --fast",
        "launchers/mpi.sh CONFIG",
    ):
        with pytest.raises((AssertionError, KeyError)):
            check(text)
