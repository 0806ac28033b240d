"""A complete checkpoint is recognized, and so is every way in which it is not complete."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint import manifest
from keel_megatron.checkpoint.manifest import DamagedError, check, read_manifest
from tests.checkpoint.samples import Payload, plant, write_checkpoint

FILES = (
    "config.yaml",
    "index.json",
    "manifest.json",
    "metadata.json",
    "rank_00000.safetensors",
    "rank_00001.safetensors",
    "state.json",
)
# What Megatron-core's own format reads with a pickle.
PICKLED = ("common.pt", ".metadata", "__0_0.distcp")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, 5)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def test_a_file_leaves_the_cache_before_it_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synced, dropped, read; and a file system that takes no advice changes nothing."""
    done: list[str] = []
    sync, record = os.fsync, manifest._record

    def synced(descriptor: int) -> None:
        sync(descriptor)
        done.append("synced")

    def advise(_descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        done.append("dropped")
        raise OSError("not here")

    def read(path: Path) -> manifest.FileRecord:
        done.append("read")
        return record(path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(manifest, "_record", read)
    assert manifest.write_checked(tmp_path / "file", [b"abc", b"d"]).bytes == 4
    assert done == ["synced", "dropped", "read"]


def test_a_complete_one(checkpoint: Path) -> None:
    check(checkpoint)
    assert sorted(path.name for path in checkpoint.iterdir()) == list(FILES)


@pytest.mark.parametrize("damage", [flip, cut, grow, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_named(
    checkpoint: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint / name)
    with pytest.raises(DamagedError, match=r"^(\S+) ") as caught:
        check(checkpoint)
    if name != "manifest.json":
        assert str(caught.value).startswith(name)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_names_and_sizes_are_seen_without_reading(
    checkpoint: Path, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint / "rank_00001.safetensors")
    with pytest.raises(DamagedError, match="rank_00001"):
        read_manifest(checkpoint)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", [*FILES, *PICKLED])
def test_a_pickle_in_any_place_is_not_executed(
    checkpoint: Path, tmp_path: Path, name: str, listed: bool
) -> None:
    marker = tmp_path / "executed"
    plant(checkpoint, name, marker, listed=listed and name != "manifest.json")
    with pytest.raises(DamagedError) as caught:
        check(checkpoint)
    assert str(caught.value).startswith(name)
    assert not marker.exists()


def test_a_configuration_that_names_code_is_not_executed(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    text = f"model: !!python/object/apply:os.mknod ['{marker}']\n".encode()
    files = read_manifest_files(checkpoint)
    files["config.yaml"] = manifest.write_checked(checkpoint / "config.yaml", [text])
    manifest.write_manifest(checkpoint, 5, files)
    with pytest.raises(DamagedError, match=r"config\.yaml is not a configuration"):
        check(checkpoint)
    assert not marker.exists()


def test_the_payload_would_show(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


@pytest.mark.parametrize("content", [None, [], {}, {"format": 1, "files": 3}])
def test_a_manifest_of_another_kind(checkpoint: Path, content: Any) -> None:
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        check(checkpoint)


def test_a_manifest_that_leaves_out_files(checkpoint: Path) -> None:
    manifest.write_manifest(checkpoint, 5, {})
    with pytest.raises(DamagedError, match=r"manifest\.json does not list config\.yaml"):
        check(checkpoint)


def test_a_later_format_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "FORMAT", 3)
    manifest.write_manifest(checkpoint, 5, read_manifest_files(checkpoint))
    monkeypatch.undo()
    with pytest.raises(DamagedError, match=r"is of format 3, not 2 or less"):
        check(checkpoint)


def read_manifest_files(checkpoint: Path) -> dict[str, manifest.FileRecord]:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: manifest.FileRecord(**record) for name, record in files.items()}


def test_a_file_outside_is_not_reached(checkpoint: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (checkpoint / "state.json").rename(outside)
    (checkpoint / "state.json").symlink_to(outside)
    with pytest.raises(DamagedError, match=r"state\.json is missing"):
        check(checkpoint)
    files = read_manifest_files(checkpoint)
    files["../outside"] = files.pop("state.json")
    manifest.write_manifest(checkpoint, 5, files)
    with pytest.raises(DamagedError, match="is not part of a checkpoint"):
        check(checkpoint)


def test_what_does_not_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that returns other bytes than it was given."""
    record = manifest._record
    flipped = manifest.FileRecord(3, "00000000")
    monkeypatch.setattr(manifest, "_record", lambda path: flipped)
    with pytest.raises(OSError, match="reads back"):
        manifest.write_checked(tmp_path / "file", [b"abc"])
    monkeypatch.setattr(manifest, "_record", record)
    assert manifest.write_checked(tmp_path / "file", [b"a", b"bc"]).bytes == 3


@pytest.mark.security
def test_a_checkpoint_of_another_step_is_damaged(checkpoint: Path) -> None:
    """By its name it would be used, and the right ones removed as older."""
    later = checkpoint.rename(checkpoint.with_name("step_00000999"))
    with pytest.raises(DamagedError, match=r"^manifest.json is of step 5$"):
        read_manifest(later)
    state = later / "state.json"
    with pytest.raises(DamagedError, match=r"^state.json is of step 5$"):
        manifest.check_file(later, "state.json", manifest._record(state))
    assert not manifest.is_whole(later)


@pytest.mark.security
def test_a_linked_checkpoint_is_not_followed(checkpoint: Path) -> None:
    link = checkpoint.with_name("step_00000006")
    link.symlink_to(checkpoint)
    with pytest.raises(DamagedError, match="it is a link"):
        read_manifest(link)


@pytest.mark.security
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_regular_file_is_not_waited_for(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(DamagedError, match=name):
        check(checkpoint)


@pytest.mark.security
def test_a_strange_rank_is_no_part_of_a_checkpoint(checkpoint: Path) -> None:
    (checkpoint / f"rank_{'1' * 200}.safetensors").touch()
    assert manifest.rank_of(f"rank_{'1' * 5000}.safetensors") is None
    with pytest.raises(DamagedError, match="is not part of a checkpoint"):
        read_manifest(checkpoint)


@pytest.mark.security
def test_a_huge_manifest_is_not_read(checkpoint: Path) -> None:
    with (checkpoint / "manifest.json").open("wb") as file:
        file.truncate(200 << 30)
    with pytest.raises(DamagedError, match=r"manifest.json cannot be read: has more than"):
        read_manifest(checkpoint)
