"""What becomes of a save that fails, and of checkpoints that are damaged afterwards."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.checkpoint import folder, manifest
from tests.checkpoint.ranks import (
    Ran,
    Sections,
    lose_a_piece,
    quota_of_rank_1,
    run_and_die,
    run_in_turn,
    unseen_full,
)
from tests.checkpoint.samples import plant
from tests.settings import settings

STEPS = 3


def sections(runs: Path, name: str, **overrides: Any) -> Sections:
    """A run whose checkpoint takes about 1.8 MB."""
    return settings(
        **{
            "training__runs_dir": str(runs),
            "training__name": name,
            "training__steps": STEPS,
            "training__global_batch_size": 4,
            "model__blocks": 2,
            "checkpoint__every": 1,
            "checkpoint__keep": 1,
            **overrides,
        }
    )


def entries(run: Path) -> list[str]:
    return sorted(path.name for path in folder.root(run).iterdir())


@pytest.fixture(scope="module")
def quota(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran, Ran]:
    """A run that goes on after rank 1 could not write its part of the second checkpoint."""
    runs = tmp_path_factory.mktemp("quota")
    config = sections(runs, "quota", checkpoint__on_error="continue")
    ((first, second),) = run_in_turn(2, [config], {"quota": quota_of_rank_1})
    return runs / "quota", first, second


def test_a_quota_on_one_rank_is_told_and_the_run_goes_on(quota: tuple[Path, Ran, Ran]) -> None:
    run, first, second = quota
    assert first.error is None
    assert [step for step, _loss, _norm in first.losses] == [1, 2, 3]
    (warning,) = [text for text in first.said if text.startswith("WARNING")]
    assert "the checkpoint of step 2 was not written" in warning
    assert "rank 1: Disk quota exceeded (rank_00001.safetensors)" in warning
    assert re.search(r"; 1\.\d MB are needed, [\d,]+\.\d MB are free: free some", warning)
    assert f"newest checkpoint: {folder.step_folder(run, 1)}" in warning
    assert "the run continues without it (checkpoint.on_error: continue)" in warning
    assert [save.step for save in first.saves] == [1, 3]
    assert second.losses == first.losses
    assert entries(run) == ["step_00000003"]


def test_pieces_that_do_not_fill_a_tensor_are_not_published(tmp_path: Path) -> None:
    config = sections(tmp_path, "hole", checkpoint__on_error="continue")
    ((first, second),) = run_in_turn(2, [config], {"hole": lose_a_piece})
    assert first.error is None
    (warning,) = [text for text in first.said if text.startswith("WARNING")]
    assert "the checkpoint of step 2 was not kept: the pieces " in warning
    assert "this is a bug of keel" in warning
    assert second.losses == first.losses
    assert entries(tmp_path / "hole") == ["step_00000003"]


@pytest.fixture
def small_disks(tmp_path: Path) -> Iterator[list[Path]]:
    """Three file systems that hold one checkpoint and a half."""
    disks = [tmp_path / name for name in ("seen", "stop", "continue")]
    mounted = []
    try:
        for disk in disks:
            disk.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", "size=2900k", "tmpfs", str(disk)]
            if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
                pytest.skip("no permission to mount a tmpfs")
            mounted.append(disk)
        yield disks
    finally:
        for disk in mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_whole(small_disks: list[Path]) -> None:
    seen, stop, on = small_disks
    waiting = {"checkpoint__async_save": False}
    runs = [
        sections(seen, "run"),
        sections(stop, "unseen", **waiting),
        sections(on, "unseen", checkpoint__on_error="continue"),
    ]
    ((early,), (late,), (going_on,)) = run_in_turn(1, runs, {"unseen": unseen_full})
    for ran, disk, name in ((early, seen, "run"), (late, stop, "unseen"), (going_on, on, "unseen")):
        assert ran.error is not None
        assert "set training.runs_dir to another disk" in ran.error
        assert "lower checkpoint.keep (1)" in ran.error
        assert f"newest checkpoint: {folder.step_folder(disk / name, 1)}" in ran.error
        assert entries(disk / name) == ["step_00000001"]
        manifest.check(folder.step_folder(disk / name, 1))
    assert "step 2 was not written" in str(early.error)
    room = r"there is not enough space; 1\.\d MB are needed, 1\.\d MB are free"
    assert re.search(room, str(early.error))
    assert "No space left on device" in str(late.error)
    assert "the run stops (checkpoint.on_error: stop" in str(late.error)
    assert len(late.losses) == 2
    assert len(going_on.losses) == STEPS
    assert str(going_on.error).startswith(
        "the run ends without a checkpoint: the checkpoint of step 3"
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_damage_a_kill_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """One good run, copied and damaged in four ways; and one that is killed while it saves."""
    kept = {"checkpoint__keep": 3}
    ((whole,),) = run_in_turn(1, [sections(tmp_path, "whole", **kept)])
    marker = tmp_path / "executed"
    for name in ("flipped", "pickle", "hopeless", "blocked"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    last = folder.step_folder(tmp_path / "flipped", 3)
    flip(last / "rank_00000.safetensors")
    plant(folder.step_folder(tmp_path / "pickle", 3), "state.json", marker, listed=True)
    plant(folder.step_folder(tmp_path / "pickle", 2), "common.pt", marker, listed=True)
    for step in (1, 2, 3):
        flip(folder.step_folder(tmp_path / "hopeless", step) / "index.json")
    shutil.rmtree(folder.root(tmp_path / "blocked"))
    folder.root(tmp_path / "blocked").write_text("")

    dying = multiprocessing.get_context("spawn").Process(
        target=run_and_die, args=(sections(tmp_path, "killed"),)
    )
    dying.start()
    dying.join(240)
    assert dying.exitcode == 9

    names = ("flipped", "pickle", "hopeless", "blocked", "killed")
    found = run_in_turn(1, [sections(tmp_path, name, **kept) for name in names])
    flipped, pickled, hopeless, blocked, killed = (ran for (ran,) in found)

    assert flipped.resumed == "step_00000002"
    assert "step_00000003 is damaged and left for inspection: rank_00000" in flipped.remarks[0]
    assert entries(tmp_path / "flipped") == [
        "step_00000001",
        "step_00000002",
        "step_00000003",
        "step_00000003.damaged",
    ]
    assert pickled.resumed == "step_00000001"
    assert "state.json is not JSON" in pickled.remarks[0]
    assert "common.pt is not part of a checkpoint" in pickled.remarks[1]
    assert not marker.exists()
    assert killed.resumed == "step_00000001"
    assert "step_00000002.partial is not complete" in killed.remarks[0]
    for ran in (flipped, pickled, killed):
        assert ran.error is None
        assert ran.digest == whole.digest

    assert str(hopeless.error).count("is damaged") == 3
    assert "no checkpoint of" in str(hopeless.error)
    assert hopeless.losses == []
    assert "was not written to" in str(blocked.error)
    assert "make it writable or set training.runs_dir" in str(blocked.error)
