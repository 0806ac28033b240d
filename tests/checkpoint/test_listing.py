"""`keel checkpoint`: what it shows of good and damaged checkpoints, and what it removes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keel_megatron.checkpoint import folder, listing, manifest
from keel_megatron.checkpoint.identity import claim
from keel_megatron.checkpoint.listing import Entry, describe, entries, prune_run, table
from keel_megatron.cli.main import app
from keel_megatron.config import UserError
from tests.checkpoint.samples import write_checkpoint
from tests.settings import small_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 10 to 50; 40 has a flipped bit, 50 is cut short, 60 is half-written."""
    config = small_config(training__runs_dir=str(tmp_path), checkpoint__keep=1)
    claim(config)
    run = config.training.folder
    for step in (10, 20, 30, 40, 50):
        write_checkpoint(run, step)
    path = folder.step_folder(run, 40) / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    path = folder.step_folder(run, 50) / "state.json"
    path.write_bytes(path.read_bytes()[:-1])
    (folder.begin(run, 60) / "rank_00000.safetensors").write_bytes(b"half")
    return run


def keel(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["checkpoint", *arguments])
    return done.exit_code, done.output


def names(run: Path) -> list[str]:
    return sorted(path.name for path in folder.root(run).iterdir())


def test_list_looks_at_sizes_and_verify_reads(run: Path) -> None:
    code, listed = keel("list", str(run))
    assert code == 0
    heading, *lines = listed.splitlines()
    assert heading.split() == ["checkpoint", "MB", "written", "condition"]
    assert [line.split()[0] for line in lines] == names(run)
    assert [line.split()[-1] for line in lines[:4]] == ["good"] * 4
    assert "DAMAGED: state.json has" in lines[4]
    assert lines[5].endswith("half-written")
    code, verified = keel("verify", str(run))
    assert code == 1
    assert "DAMAGED: rank_00001.safetensors has checksum" in verified.splitlines()[4]


def test_verify_is_content_with_good_ones(run: Path) -> None:
    for step in (40, 50):
        folder.remove(folder.step_folder(run, step))
    assert keel("verify", str(run))[0] == 0


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_checkpoint_that_the_run_removes_meanwhile_is_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Step 10 just before it is read, 20 just after, 30 before it is shown."""
    for step in (40, 50):
        folder.remove(folder.step_folder(run, step))

    def removing(path: Path) -> None:
        step = folder.step_of(path)
        if step == 10:
            folder.remove(path)
        manifest.check(path)
        if step == 20:
            folder.remove(path)

    def shown(found: Sequence[Entry]) -> list[str]:
        folder.remove(folder.step_folder(run, 30))
        return table(found)

    for name, function in (("check", removing), ("read_manifest", removing), ("table", shown)):
        monkeypatch.setattr(listing, name, function)
    code, said = keel(command, str(run))
    assert code == 0, said
    assert [line.split()[0] for line in said.splitlines()[1:]] == [
        "step_00000030",
        "step_00000060.partial",
    ]


def test_show_tells_that_a_checkpoint_was_removed_meanwhile(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removing(path: Path) -> int:
        folder.remove(path)
        return path.stat().st_size

    monkeypatch.setattr(listing, "_size", removing)
    monkeypatch.setattr(listing, "entries", lambda *_arguments, **_options: [])
    with pytest.raises(UserError, match="step_00000010 has been removed: "):
        describe(run, 10)


def test_files_that_are_removed_while_a_size_is_taken_count_as_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        yield str(path), [], ["gone", *(entry.name for entry in path.iterdir())]

    sizes = [entry.bytes for entry in entries(run, read_all=False)]
    monkeypatch.setattr("keel_megatron.checkpoint.listing.os.walk", walk)
    assert [entry.bytes for entry in entries(run, read_all=False)] == sizes


def test_show_tells_what_is_kept_and_what_may_change(run: Path) -> None:
    code, shown = keel("show", str(run))
    assert code == 0
    assert "step        40\nsamples     640\n" in shown
    assert "TP 1 x PP 2 x VPP 1 x DP 1 on cpu" in shown
    assert "also keeps  guard\n" in shown
    assert "may change  parallel.tensor, " in shown
    assert "optimizer.*" in shown
    assert "step        10\n" in keel("show", str(run), "--step", "10")[1]


def test_show_says_what_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--step: there is no .*step_00000011; there are: 10"):
        describe(run, 11)
    with pytest.raises(UserError, match=r"step_00000050 is damaged: state\.json"):
        describe(run, 50)
    with pytest.raises(UserError, match="contains no checkpoints"):
        entries(tmp_path, read_all=False)


def test_prune_counts_good_ones_and_leaves_damaged_ones(run: Path) -> None:
    code, said = keel("prune", str(run), "--keep", "1", "--keep-every", "20")
    assert code == 0
    assert said.splitlines() == [f"removed {folder.step_folder(run, 10)}"]
    assert names(run) == [
        "step_00000020",
        "step_00000030",
        "step_00000040",
        "step_00000050",
        "step_00000060.partial",
    ]


def test_prune_takes_the_runs_settings_and_the_damaged_if_asked(run: Path) -> None:
    assert keel("prune", str(run), "--damaged")[0] == 0
    assert names(run) == ["step_00000030"]
    assert keel("prune", str(run)) == (0, "nothing to remove\n")


def test_it_does_not_wait_for_torch() -> None:
    code = "import sys, keel_megatron.checkpoint.listing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.security
def test_prune_removes_a_link_and_not_what_it_leads_to(run: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", 5)
    link = folder.root(run) / "step_00000005"
    link.symlink_to(other)
    code, output = keel("prune", str(run), "--damaged")
    assert code == 0, output
    assert not link.is_symlink()
    assert (other / "manifest.json").is_file()


@pytest.mark.security
def test_prune_says_why_it_does_not_follow(run: Path, tmp_path: Path) -> None:
    borrowed = small_config(training__runs_dir=str(tmp_path), training__name="borrowed")
    claim(borrowed)
    folder.root(borrowed.training.folder).symlink_to(folder.root(run))
    before = names(run)
    with pytest.raises(UserError, match=r"cannot remove \S+/borrowed/checkpoints: is a link"):
        prune_run(borrowed.training.folder, 1, 0, damaged=True)
    assert names(run) == before


@pytest.mark.security
def test_a_state_of_anything_does_not_stop_prune(tmp_path: Path) -> None:
    config = small_config(training__runs_dir=str(tmp_path))
    claim(config)
    run = config.training.folder
    for step in (10, 20):
        write_checkpoint(run, step)
    state = folder.step_folder(run, 20) / "state.json"
    state.write_text(state.read_text().replace('"guard": {', '"guard": [{').replace("}", "}"))
    assert entries(run, read_all=False)[1].problem is not None
    assert prune_run(run, 1, 0, damaged=False) == []
