"""What torch compiles is kept where this user alone can write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.compat import compile_cache
from keel_megatron.errors import UserError

pytestmark = pytest.mark.security
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (compile_cache.CACHE, compile_cache.INDUCTOR, compile_cache.TRITON):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_cache_is_the_users_alone(home: Path) -> None:
    expected = home / "cache" / "keel-megatron" / "compiled"
    for _ in range(2):
        assert compile_cache.use() == expected
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(expected)
    assert os.environ["TRITON_CACHE_DIR"] == str(expected / "triton")
    for folder in (expected, expected.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    from torch._inductor import config

    assert not config.cpp_cache_precompile_headers


def test_it_may_be_put_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_CACHE", str(home / "scratch"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_me")  # torch's own choice
    assert compile_cache.use() == home / "scratch" / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(home / "mine"))
    assert compile_cache.use() == home / "mine"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("link", "is a link"),
        ("inner link", "is a link"),
        ("file", "is no folder"),
        ("mode", "can be entered by others"),
        ("parent", "can be written by everybody"),
        pytest.param("owner", r"belongs to another user \(id 12345\)", marks=ROOT),
    ],
)
def test_a_folder_that_others_may_have_filled_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, change: str, problem: str
) -> None:
    cache, other = home / "mine", home / "other"
    monkeypatch.setenv("KEEL_CACHE", str(cache))
    other.mkdir(mode=0o700)
    if change == "link":
        cache.symlink_to(other)
    elif change == "file":
        cache.touch()
    else:
        cache.mkdir(mode=0o700)
    if change == "inner link":
        (cache / "compiled").symlink_to(other)
    elif change == "mode":
        cache.chmod(0o750)
    elif change == "parent":
        home.chmod(0o777)
    elif change == "owner":
        os.chown(cache, 12345, 12345)
    with pytest.raises(UserError, match=f"KEEL_CACHE: .* {problem}"):
        compile_cache.use()


def test_a_home_that_cannot_be_written_costs_the_cache_only(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEL_CACHE", "/proc/none/cache")
    found = compile_cache.use()
    assert found.is_dir()
    assert found.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def node(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A node of several, with a disk of its own; what is to be done at its end."""
    ends: list[tuple[Any, ...]] = []
    (home / "disk").mkdir()
    monkeypatch.setattr(compile_cache.tempfile, "tempdir", str(home / "disk"))
    monkeypatch.setattr(compile_cache.atexit, "register", lambda *call, **_: ends.append(call))
    for name, value in (("WORLD_SIZE", "16"), ("LOCAL_WORLD_SIZE", "8"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    return ends


def test_a_node_of_several_compiles_on_its_own_disk(
    home: Path, node: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = compile_cache.private_folder()
    (cache / "fx").mkdir()
    (cache / "fx" / "old").write_text("compiled before")
    local = compile_cache.use()
    assert local == home / "disk" / f"keel-compiled-{os.geteuid()}"
    assert local.stat().st_mode & 0o777 == 0o700
    assert (local / "fx" / "old").read_text() == "compiled before"
    (local / "triton").mkdir()
    (local / "triton" / "new").write_text("compiled now")
    ((copy, *arguments),) = node
    copy(*arguments)
    assert (cache / "triton" / "new").read_text() == "compiled now"
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 2
    # The other ranks of the node use the same folder and copy nothing.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert compile_cache.use() == local
    assert len(node) == 1


def test_a_name_that_somebody_else_has_taken_is_not_used(
    home: Path, node: list[tuple[Any, ...]]
) -> None:
    taken = home / "disk" / f"keel-compiled-{os.geteuid()}"
    taken.symlink_to(home)
    found = compile_cache.use()
    assert found.parent == home / "disk"
    assert found != taken
    assert not list(home.glob("fx"))


def test_more_graphs_are_allowed_and_never_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config

    monkeypatch.setattr(config, "recompile_limit", 8)
    compile_cache.allow_graphs(32)
    assert config.recompile_limit == 32
    compile_cache.allow_graphs(4)
    assert config.recompile_limit == 32
