"""The programs that look at other versions: of megatron-core, and of Python."""

from __future__ import annotations

import subprocess
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from tools import check_pins, test_next


def answer(code: int, errors: str = "", output: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, output, errors)


def test_without_a_network_and_a_cache_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_next, "HOME", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: answer(1, "no route to host"))
    with pytest.raises(test_next.NotThereError, match=r"(?s)0\.19 cannot .* network .*no route"):
        test_next.unpacked("0.19")


def test_the_newest_wheel_is_unpacked_with_this_pythons_helper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, which is all there is without a network."""
    monkeypatch.setattr(test_next, "HOME", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: answer(1, "no route to host"))
    (tmp_path / "wheels").mkdir()
    for number in ("0.19.2", "0.19.10"):
        wheel = tmp_path / "wheels" / f"megatron_core-{number}-cp312-cp312-linux_x86_64.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("megatron/core/datasets/helpers_cpp.other.so", "")
    folder = test_next.unpacked("0.19")
    assert folder == tmp_path / "0.19.10"
    assert len(list((folder / "megatron/core/datasets").glob("helpers_cpp*.so"))) == 2
    assert test_next.unpacked("0.19.2").name == "0.19.2"


def test_the_table_has_a_line_for_each_version() -> None:
    results = [
        test_next.Result(version, part, passed=part != "demo", seconds=2.0, summary="")
        for version in ("0.18.2", "0.19.2")
        for part in ("layouts", "demo")
    ]
    assert test_next.table(results, ["0.18.2", "0.19.2"]).splitlines()[::3] == [
        "| megatron-core | layouts | demo |",
        "| 0.19.2 | passed, 2 s | FAILED, 2 s |",
    ]


def test_installed_packages_accept_the_oldest_python_of_a_version() -> None:
    """Debian 12 has Python 3.11.2, and a package for 3.11.5 would leave it without a solution."""
    oldest = f"{check_pins.pythons()[0]}.0"
    refused = [
        f"{package.name} {package.version}: {required}"
        for package in metadata.distributions()
        if (required := package.metadata.get("Requires-Python"))
        and not SpecifierSet(required).contains(oldest)
    ]
    assert refused == []


def test_a_conflict_of_pins_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "uv").mkdir()
    monkeypatch.setattr(check_pins, "CACHE", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: answer(1, "no solution\n"))
    assert check_pins.conflict("3.11") == "no solution"
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: answer(0, "a warning"))
    assert check_pins.conflict("3.11") == ""


def test_pins_apply_by_their_markers() -> None:
    text = 'a==1 # why\n# more\nb==2; python_version < "3.12"\n'
    assert check_pins.pins(text, "3.11") == ["a==1", "b==2"]
    assert check_pins.pins(text, "3.13") == ["a==1"]
    assert check_pins.pythons() == ["3.11", "3.12", "3.13"]


def test_every_pin_without_a_wheel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip names one at a time; a failure of another kind is not a missing pin."""
    wheels = {"a==1", "c==3"}

    def pip(*arguments: Any) -> subprocess.CompletedProcess[str]:
        missing = [name for name in arguments if "==" in name and name not in wheels]
        if not missing:
            return answer(0)
        return answer(1, f"ERROR: No matching distribution found for {missing[0]}")

    monkeypatch.setattr(check_pins, "pip", pip)
    wanted = ["a==1", "b==2", "c==3", "d==4"]
    assert check_pins.without_wheel(wanted, "3.13") == ["b==2", "d==4"]
    monkeypatch.setattr(check_pins, "pip", lambda *_arguments: answer(1, "no route to host"))
    with pytest.raises(check_pins.NoAnswerError, match="no route"):
        check_pins.without_wheel(wanted, "3.13")
