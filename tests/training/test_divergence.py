"""What is not finite is never applied nor saved; what came before it is kept."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import yaml
from keel_megatron.checkpoint import folder, manifest
from keel_megatron.checkpoint.listing import prune_run
from keel_megatron.cli import main as command
from keel_megatron.dashboard.runs import look
from keel_megatron.errors import DivergedError
from keel_megatron.runtime import exit_codes
from keel_megatron.training import run
from tests.checkpoint.ranks import no_validation_loss, poison, run_in_turn, spoil
from tests.distributed import run_ranks
from tests.engines.deepspeed.ranks import needs_deepspeed
from tests.settings import settings

ENGINES = [
    "megatron",
    pytest.param("deepspeed", marks=needs_deepspeed),
]
ACTIONS = ("off", "warn", "skip", "rollback")
WILD = {"optimizer__learning_rate": 1e30, "optimizer__clip_grad": 0.0, "guard__limit": 3}


def sections(runs: Path, name: str, **overrides: Any) -> dict[str, dict[str, Any]]:
    """A small run at a constant rate that saves after every step."""
    return settings(
        **{
            "training__runs_dir": str(runs),
            "training__name": name,
            "training__steps": 3,
            "training__global_batch_size": 4,
            "model__blocks": 2,
            "schedule__decay": "constant",
            "checkpoint__every": 1,
            **overrides,
        }
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_diverges_stops_and_keeps_what_it_had(engine: str, tmp_path: Path) -> None:
    """With a rate of 1e30 the weights are of that size after one step, and the loss is NaN."""
    runs = [
        sections(
            tmp_path,
            action,
            training__engine=engine,
            training__steps=9,
            guard__action=action,
            **WILD,
        )
        for action in ACTIONS
    ]
    for action, (ran,) in zip(ACTIONS, run_in_turn(1, runs), strict=True):
        assert ran.diverged, ran
        assert "training has diverged: " in str(ran.error)
        first = folder.step_folder(tmp_path / action, 1)
        skipped = [text for text in ran.said if "its update is skipped" in text]
        if action == "rollback":
            assert "step 2 would be rollback number 4 within" in str(ran.error)
            assert not skipped
            continue
        assert "step 5 would be skipped update number 4 in a row" in str(ran.error)
        assert "the newest from before the first anomaly, step 2: " in str(ran.error)
        assert str(first) in str(ran.error)
        assert len(skipped) == 4
        assert skipped[0].startswith(f"guard, step 2 ({action}): ")
        assert ran.skipped == [0, 1, 2, 3]
        assert folder.steps(tmp_path / action) == [1, 3, 4]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_update_that_is_not_finite_is_not_made(engine: str, tmp_path: Path) -> None:
    """Whatever guard.action is: weights, masters and moments are those of a step less."""
    less = sections(tmp_path, "less", training__engine=engine, training__steps=2)
    more = [
        sections(tmp_path, action, training__engine=engine, guard__action=action)
        for action in ("off", "warn", "skip")
    ]
    faults = {action: partial(poison, [3]) for action in ("off", "warn", "skip")}
    (expected,), *found = run_in_turn(1, [less, *more], faults)
    for (ran,) in found:
        assert ran.error is None
        assert ran.skipped == [0, 0, 1]
        assert ran.digest == expected.digest


def test_the_checkpoint_from_before_stays_until_a_window_was_accepted(tmp_path: Path) -> None:
    """Through a resume and `keel checkpoint prune`."""
    settings_of = partial(
        sections, tmp_path, "run", checkpoint__keep=1, guard__window=8, guard__min_steps=8
    )
    faults = {"run": partial(poison, [3])}
    for steps, kept in ((5, [2, 5]), (10, [2, 10]), (12, [12])):
        ((ran,),) = run_in_turn(1, [settings_of(training__steps=steps)], faults)
        assert ran.error is None
        assert folder.steps(tmp_path / "run") == kept
        prune_run(tmp_path / "run", keep=1, keep_every=0, damaged=False)
        assert folder.steps(tmp_path / "run") == kept


def test_a_state_that_is_not_finite_is_not_published(tmp_path: Path) -> None:
    """On one of two ranks; `checkpoint.on_error: continue` is about disks."""
    tensors = {
        "first": "optimizer.state.exp_avg.",
        "moment": "optimizer.state.exp_avg_sq.",
        "master": "optimizer.state.param.",
    }
    runs = [
        sections(
            tmp_path,
            name,
            parallel__pipeline=2,
            training__precision="bf16",
            checkpoint__on_error="continue",
        )
        for name in tensors
    ]
    faults = {name: partial(spoil, tensor) for name, tensor in tensors.items()}
    for name, (first, second) in zip(tensors, run_in_turn(2, runs, faults), strict=True):
        assert first.diverged
        assert second.diverged
        assert f"training has diverged: {tensors[name]}" in str(first.error)
        assert "is not finite (rank 1; 1 of 2 ranks have such a tensor)" in str(first.error)
        assert "so the checkpoint of step 2 is not kept" in str(first.error)
        root = folder.root(tmp_path / name)
        assert [path.name for path in root.iterdir()] == ["step_00000001"]
        manifest.check(root / "step_00000001")


def test_a_run_whose_last_validation_is_not_finite_is_not_done(tmp_path: Path) -> None:
    """The last step may ruin the weights, and no further one would find it."""
    faults = {"run": no_validation_loss}
    ((ran,),) = run_in_turn(1, [sections(tmp_path, "run", training__steps=1)], faults)
    assert ran.diverged
    assert "the last validation loss is nan, and step 1 is not saved" in str(ran.error)
    assert folder.steps(tmp_path / "run") == []


def diverge(path: str) -> str:
    try:
        run.run_training(Path(path))
    except DivergedError as error:
        return str(error)
    return "it did not"


def test_the_folder_says_how_it_ended(tmp_path: Path) -> None:
    wild = sections(
        tmp_path / "runs",
        "wild",
        training__steps=9,
        data__cache_dir=str(tmp_path / "data"),
        data__text=torch.__file__,
        **WILD,
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wild))
    (said,) = run_ranks(1, diverge, str(tmp_path / "run.yaml"))
    assert "training has diverged: " in said
    folder_of = tmp_path / "runs" / "wild"
    assert (folder_of / "exit_code").read_text() == "65\n"
    (status,) = look([folder_of])
    assert status.state == "failed"
    assert status.problems[0].startswith("training has diverged: step ")
    assert status.problems[0].endswith("(code 65)")
    lines = [json.loads(line) for line in (folder_of / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [0, 1, 2, 3]


@pytest.mark.parametrize(("restarts", "code"), [("0", 65), ("3", 0)])
def test_the_command_ends_with_its_code(
    restarts: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun would start it again after any code but 0; the folder's file has the truth."""

    def fail() -> None:
        raise DivergedError("training has diverged: so it has")

    monkeypatch.setattr(command, "app", fail)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.delenv(exit_codes.MISTAKE, raising=False)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == code
    assert capsys.readouterr().err == "error: training has diverged: so it has\n"
