"""What the doctor says of the packages whose names mislead."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from keel_megatron.cluster import doctor
from tests.distributed import run_ranks
from tests.integration.commands import keel, write_config

# Packages as they are found in the wild, by their files.
WEB_APEX = {"apex/__init__.py": "raise RuntimeError('a web toolkit')"}
BARE_APEX = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "import amp_C"}
WHOLE_APEX = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "", "amp_C.py": ""}
EMPTY_TE = {"transformer_engine/__init__.py": "raise RuntimeError('Found empty meta package')"}
WHOLE_TE = {"transformer_engine/__init__.py": "", "transformer_engine/pytorch.py": ""}


def find(folder: Path, name: str, files: dict[str, str], version: str) -> tuple[str, str]:
    """The doctor's component and warning of a package, in a process that sees these files."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    ((text, warning),) = run_ranks(1, found_beside, folder, name)
    return text, warning


def found_beside(folder: Path, name: str) -> tuple[str, str]:
    sys.path.insert(0, str(folder))
    (found,) = (each for each in doctor.installed() if each.name == name)
    return found.text, str(found.warning)


@pytest.mark.parametrize(
    ("name", "files", "version", "text", "warning"),
    [
        ("apex", WEB_APEX, "0.9.10.dev0", "not NVIDIA's: not used", "is a web toolkit, not NVIDIA"),
        ("apex", BARE_APEX, "0.1", "without its extensions", "build it with APEX_CPP_EXT=1"),
        ("apex", WHOLE_APEX, "0.1", "0.1, NVIDIA's", "None"),
        ("transformer-engine", EMPTY_TE, "2.9.0", "2.9.0, broken: Found empty", "pip uninstall"),
        ("transformer-engine", WHOLE_TE, "2.9.0", "2.9.0", "None"),
    ],
)
def test_packages_with_misleading_names(
    tmp_path: Path, name: str, files: dict[str, str], version: str, text: str, warning: str
) -> None:
    found, warned = find(tmp_path, name, files, version)
    assert text in found
    assert warning in warned


def test_what_is_absent_is_no_warning() -> None:
    found = {component.name: component for component in doctor.installed()}
    assert {"torch", "CUDA", "cuDNN", "NCCL", "devices", "megatron-core", "triton", "apex"} <= set(
        found
    )
    assert found["torch"].text.startswith("2.")
    for name in ("apex", "transformer-engine"):
        if found[name].text.startswith("absent"):
            assert found[name].warning is None


def test_the_command(tmp_path: Path) -> None:
    done = keel(tmp_path, "doctor")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("keel-megatron ")
    assert {"found", "used"} <= set(lines)
    wrong = keel(tmp_path, "doctor", "absent.yaml")
    assert wrong.returncode == 2
    assert "absent.yaml: 1 problem in the configuration" in wrong.stderr


def test_the_command_says_what_a_run_will_use(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, Path(__file__), kernels__backend="torch"))
    done = keel(tmp_path, "doctor", config)
    assert "kernels.backend     torch: torch, gradient fusion off" in done.stdout
    assert "attention           torch's flash kernel for CPUs" in done.stdout
    asked = keel(tmp_path, "doctor", config, "kernels.backend=apex")
    assert asked.returncode == 0, asked.stderr
    assert "kernels.backend     apex: cannot be used" in asked.stdout
    assert "warning: kernels.backend: apex is set, but NVIDIA's Apex cannot" in asked.stderr
