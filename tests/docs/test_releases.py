"""What a release consists of: archives, version, workflows. `make dist` builds and tries one."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

import yaml
from keel_megatron import __version__
from tests.docs.commands import ROOT
from tools.dist import changelog_problems, normalise
from tools.fresh_machine import environment

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Distribution:
    """The project as setuptools reads it."""
    monkeypatch.chdir(ROOT)
    found = Distribution({"script_name": "setup.py"})
    apply_configuration(found, ROOT / "pyproject.toml")
    found.include_package_data = False  # it would write to the checkout
    return found


def test_every_file_of_the_package_is_in_the_wheel(project: Distribution) -> None:
    """Python's and others; the bundled configurations, which are a link here, included."""
    command: Any = project.get_command_obj("build_py")
    command.ensure_finalized()
    built = {Path(path) for _package, _module, path in command.find_all_modules()}
    built |= {Path(folder, name) for _, folder, _, names in command.data_files for name in names}
    package = Path("keel_megatron")
    wanted = {path for path in package.rglob("*") if path.is_file()}
    wanted = {path for path in wanted if "__pycache__" not in path.parts}
    configs = ROOT.joinpath("yaml").rglob("*.yaml")
    wanted |= {package / "configs" / path.relative_to(ROOT / "yaml") for path in configs}
    tasks = {
        path for path in wanted if path.parent.name == "evaluation" and "configs" in path.parts
    }
    assert {str(path) for path in built} == {str(path) for path in wanted - tasks}


def test_the_version_has_one_place(project: Distribution) -> None:
    assert project.metadata.version == __version__
    written = [
        path.name
        for path in (*ROOT.joinpath("docker").glob("Dockerfile*"), ROOT / "CITATION.cff")
        if re.search(
            rf"^(ARG VERSION=|version: *).*{re.escape(__version__)}", path.read_text(), re.M
        )
    ]
    assert written == []
    assert changelog_problems(__version__, (ROOT / "CHANGELOG.md").read_text("utf-8")) == []
    assert changelog_problems("9.9.9", "## [Unreleased]\n## [0.1.0] - 2026-12-01\n") != []
    assert changelog_problems("0.1.0", "## [Unreleased]\n## [0.1.0] - 2026-12-01\n") == []


def an_archive(path: Path, names: list[str], mtime: int, mode: int, owner: int) -> bytes:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime, entry.mode, entry.uid = len(name), mtime, mode, owner
            tar.addfile(entry, io.BytesIO(name.encode()))
    normalise(path, 1_700_000_000)
    return path.read_bytes()


def test_an_archives_bytes_depend_on_its_files_alone(tmp_path: Path) -> None:
    first = an_archive(tmp_path / "one.tar.gz", ["p/a", "p/b"], 5, 0o644, 0)
    (tmp_path / "other").mkdir()
    assert an_archive(tmp_path / "other" / "two.tar.gz", ["p/b", "p/a"], 77, 0o600, 1000) == first
    assert an_archive(tmp_path / "three.tar.gz", ["p/a", "p/c"], 5, 0o644, 0) != first


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_targets_of_the_makefile_with_pinned_actions(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 60
        runs = [step["run"].split() for step in job["steps"] if "run" in step]
        assert runs
        assert all(words[0] == "make" and set(words[1:]) <= set(targets) for words in runs), runs
    used = re.findall(r"uses: (.*)", text)
    assert used
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", name) for name in used)
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")


def test_a_fresh_machine_has_nothing_of_the_callers_but_the_way_to_packages() -> None:
    caller = {"PIP_INDEX_URL": "i", "https_proxy": "p", "PYTHONPATH": "x", "VIRTUAL_ENV": "y"}
    caller |= {"HOME": "/root", "PATH": "/root/.pyenv/shims", "KEEL_CACHE": "z"}
    found = environment(Path("/tmp/fresh"), Path("/usr/bin/python3"), caller)
    assert sorted(found) == [
        *("HOME", "LANG", "PATH", "PIP_INDEX_URL", "PIP_NO_CACHE_DIR", "TMPDIR", "https_proxy"),
    ]
    assert found["HOME"] == "/tmp/fresh/home"
    assert found["PATH"] == "/usr/bin:/usr/local/bin:/usr/bin:/bin"
