"""The folder of checkpoints: complete or absent, newest first, the oldest leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from keel_megatron.checkpoint import folder
from keel_megatron.checkpoint.identity import claim, identity_changes, saved_config
from keel_megatron.config import UserError
from tests.settings import small_config


def write(run: Path, step: int) -> Path:
    partial = folder.begin(run, step)
    (partial / "data").write_text(str(step))
    return folder.publish(partial)


def test_a_checkpoint_appears_when_it_is_published(tmp_path: Path) -> None:
    partial = folder.begin(tmp_path, 20)
    (partial / "data").write_text("half")
    assert folder.steps(tmp_path) == []
    assert folder.latest(tmp_path) is None
    folder.publish(partial)
    assert folder.latest(tmp_path) == tmp_path / "checkpoints" / "step_00000020"


def test_a_half_written_one_is_started_anew(tmp_path: Path) -> None:
    (folder.begin(tmp_path, 5) / "old").write_text("")
    assert list(folder.begin(tmp_path, 5).iterdir()) == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 5, 100_000_000, 20):
        write(tmp_path, step)
    assert folder.steps(tmp_path) == [5, 10, 20, 100_000_000]
    removed = folder.prune(tmp_path, keep=2)
    assert [path.name for path in removed] == ["step_00000005", "step_00000010"]
    assert folder.steps(tmp_path) == [20, 100_000_000]


def test_some_are_kept_for_good_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        write(tmp_path, step)
    folder.prune(tmp_path, keep=2, keep_every=30, spare={50, 70})
    assert folder.steps(tmp_path) == [30, 40, 50, 60, 70]


@pytest.mark.parametrize(
    ("anomaly", "left"),
    [(None, [60, 70]), (45, [40, 60, 70]), (40, [20, 60, 70]), (65, [60, 70]), (5, [60, 70])],
)
def test_the_newest_from_before_an_anomaly_stays(
    tmp_path: Path, anomaly: int | None, left: list[int]
) -> None:
    """One more than `keep`; a damaged one (of step 30) is none."""
    for step in range(10, 80, 10):
        write(tmp_path, step)
    folder.prune(tmp_path, keep=2, spare={30}, anomaly_step=anomaly)
    assert [step for step in folder.steps(tmp_path) if step != 30] == left


def test_a_damaged_one_is_set_aside_when_its_step_comes_again(tmp_path: Path) -> None:
    for step in (7, 7):
        write(tmp_path, step)
    for number in (1, 2):
        partial = folder.begin(tmp_path, 7)
        (partial / "data").write_text(f"again {number}")
        folder.publish(partial, damaged=True)
    assert folder.steps(tmp_path) == [7]
    assert [path.name for path in folder.remains(tmp_path)] == [
        "step_00000007.damaged",
        "step_00000007.damaged-2",
    ]
    assert (folder.root(tmp_path) / "step_00000007" / "data").read_text() == "again 2"


def test_a_published_one_replaces_an_older_of_its_step(tmp_path: Path) -> None:
    write(tmp_path, 7)
    partial = folder.begin(tmp_path, 7)
    (partial / "new").write_text("")
    assert [path.name for path in folder.publish(partial).iterdir()] == ["new"]


def test_a_folder_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = small_config(training__runs_dir=str(tmp_path))
    claim(run)
    claim(small_config(training__runs_dir=str(tmp_path), model__blocks=4))
    claim(run)
    write(run.training.folder, 3)
    other = small_config(
        training__runs_dir=str(tmp_path), model__blocks=4, training__steps=99, training__seed=5
    )
    with pytest.raises(UserError) as caught:
        claim(other)
    message = str(caught.value)
    assert "model.blocks: 8 there, 4 now" in message
    assert "training.seed: 1234 there, 5 now" in message
    assert "training.steps: " not in message
    assert "settings that may change: parallel.tensor" in message
    assert saved_config(run.training.folder) == run


def test_what_a_run_may_change(tmp_path: Path) -> None:
    run = small_config(training__runs_dir=str(tmp_path))
    changed = small_config(
        training__runs_dir=str(tmp_path),
        training__steps=99,
        optimizer__learning_rate=1.0,
        parallel__tensor=2,
        training__micro_batch_size=1,
        tracking__log_every=7,
    )
    assert list(identity_changes(run, changed)) == []


def test_the_optimizer_is_not_changed(tmp_path: Path) -> None:
    """Neither has what the other keeps."""
    run = small_config(training__runs_dir=str(tmp_path))
    muon = small_config(training__runs_dir=str(tmp_path), optimizer__name="muon")
    assert list(identity_changes(run, muon)) == [("optimizer.name", "adamw", "muon")]


def test_a_checkpoint_alone_still_knows_its_configuration(tmp_path: Path) -> None:
    run = small_config(training__runs_dir=str(tmp_path))
    claim(run)
    partial = folder.begin(run.training.folder, 3)
    (run.training.folder / "config.yaml").rename(partial / "config.yaml")
    folder.publish(partial)
    assert saved_config(run.training.folder) == run


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains no run: there is no config.yaml"):
        saved_config(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"training.runs_dir: cannot write"):
        claim(small_config(training__runs_dir=str(tmp_path / "file")))


@pytest.mark.security
def test_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path / "a", step)
    theirs = folder.root(tmp_path / "a")
    mine = tmp_path / "b"
    for step in (10, 20, 40):
        write(mine, step)
    (folder.root(mine) / "step_00000015").symlink_to(theirs / "step_00000010")
    (folder.root(mine) / "step_00000010.partial").symlink_to(theirs / "step_00000020")
    (folder.root(mine) / "step_00000050.partial").symlink_to(theirs / "step_00000020")
    removed = folder.prune(mine, keep=1)
    assert [path.name for path in removed] == ["step_00000010", "step_00000015", "step_00000020"]
    write(mine, 50)
    (folder.root(mine) / "step_00000060").symlink_to(theirs / "step_00000030")
    write(mine, 60)
    assert sorted(path.name for path in folder.root(mine).iterdir()) == [
        "step_00000040",
        "step_00000050",
        "step_00000060",
    ]
    assert all((theirs / f"step_{step:08d}" / "data").is_file() for step in (10, 20, 30))


@pytest.mark.security
def test_a_linked_folder_of_checkpoints_is_not_pruned(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path / "a", step)
    (tmp_path / "b").mkdir()
    folder.root(tmp_path / "b").symlink_to(folder.root(tmp_path / "a"))
    with pytest.raises(OSError, match="is a link") as caught:
        folder.prune(tmp_path / "b", keep=1)
    assert caught.value.filename == str(folder.root(tmp_path / "b"))
    assert folder.steps(tmp_path / "a") == [10, 20]


def test_what_is_not_the_checkpoint_of_its_name_stays(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    write(tmp_path, 99)
    strange = ("step_00000010", "step_00000099")
    folder.prune(tmp_path, keep=1, is_whole=lambda path: path.name not in strange)
    assert folder.steps(tmp_path) == [10, 30, 99]


def test_a_step_has_a_plausible_number(tmp_path: Path) -> None:
    write(tmp_path, 10)
    for name in ("step_" + "9" * 200, "step_" + 8 * "\u0660"):
        (folder.root(tmp_path) / name).mkdir()
    assert folder.steps(tmp_path) == [10]


def test_one_that_is_kept_for_good_is_the_one_before_an_anomaly(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    folder.prune(tmp_path, keep=1, keep_every=30, anomaly_step=35)
    assert folder.steps(tmp_path) == [30, 50]
