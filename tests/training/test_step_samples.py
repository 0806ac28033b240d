"""The samples of a step: what the run recorded, and what follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.config.load import dump_config
from keel_megatron.config.run import RunConfig
from keel_megatron.errors import UserError
from keel_megatron.tracking.metrics import MetricsFile
from keel_megatron.tracking.records import CheckpointRecord, ValidationRecord
from keel_megatron.training.step_samples import samples_of_step
from tests.checkpoint.samples import write_checkpoint
from tests.settings import small_config
from tests.tracking.samples import record


def config(tmp_path: Path, **overrides: Any) -> RunConfig:
    defaults = {"training__steps": 40, "training__runs_dir": str(tmp_path)}
    return small_config(**{**defaults, **overrides})


class Run:
    """Writes the records of a run's steps of sequences of 32 tokens.

    Args:
        run: its configuration.
    """

    def __init__(self, run: RunConfig) -> None:
        run.training.folder.mkdir()
        self.metrics = MetricsFile(run.training.folder / "metrics.jsonl")
        self.consumed = 0

    def train(self, steps: range, size: int, seconds: float = 0.137) -> None:
        """Some steps of one batch size."""
        for step in steps:
            self.consumed += size
            tokens = 32 * self.consumed
            values = {"tokens_per_second": size * 32 / seconds, "seconds": seconds}
            self.metrics.write(
                record(step, consumed_samples=self.consumed, consumed_tokens=tokens, **values)
            )
            self.metrics.write(ValidationRecord(step, 1.0, self.consumed, tokens))
            self.metrics.write(CheckpointRecord(step, 0.1, 0.1, 1000))


def test_they_are_those_of_the_batch_size_of_then(tmp_path: Path) -> None:
    """20 steps of 16 sequences, and two of 8."""
    run = config(tmp_path, training__global_batch_size=8)
    trained = Run(run)
    trained.train(range(1, 21), 16)
    trained.train(range(21, 23), 8)
    path = run.training.folder / "metrics.jsonl"
    assert samples_of_step(run, 20) == (range(304, 320), f"as recorded in {path}")
    assert samples_of_step(run, 22)[0] == range(328, 336)
    expected = (range(344, 352), f"counted on from step 22 of {path}")
    assert samples_of_step(run, 24) == expected


def test_a_rollback_skips_samples(tmp_path: Path) -> None:
    run = config(tmp_path)
    trained = Run(run)
    trained.train(range(1, 8), 16)
    trained.metrics.rewind(4)
    trained.consumed += 16  # those of the anomalous step 8
    trained.train(range(5, 7), 16)
    assert samples_of_step(run, 4)[0] == range(48, 64)
    assert samples_of_step(run, 5)[0] == range(128, 144)
    assert samples_of_step(run, 7)[0] == range(160, 176)


def test_the_last_record_of_a_step_counts(tmp_path: Path) -> None:
    run = config(tmp_path)
    trained = Run(run)
    trained.train(range(1, 5), 16)
    trained.train(range(4, 6), 16)
    assert samples_of_step(run, 4)[0] == range(64, 80)


def test_without_a_run_they_are_counted(tmp_path: Path) -> None:
    """Four, four, four and eight."""
    ramp = {"start": 4, "increment": 4, "samples": 32}
    run = config(tmp_path, schedule__rampup_batch_size=ramp)
    numbers, known = samples_of_step(run, 4)
    assert numbers == range(12, 20)
    assert known.startswith("counted from step 1, as ")
    Run(run).train(range(1, 4), 4)
    assert samples_of_step(run, 6)[0] == range(28, 40)


def test_a_position_that_is_kept_is_counted_from(tmp_path: Path) -> None:
    """A checkpoint of step 2 and 32 samples."""
    origin = config(tmp_path, training__name="first")
    write_checkpoint(origin.training.folder, 2, config=dump_config(origin).encode())
    settings = {
        "training__initialize_from": str(origin.training.folder),
        "training__keep_position": True,
        "training__keep_optimizer": True,
        "training__global_batch_size": 8,
    }
    run = config(tmp_path, training__name="second", **settings)
    known = f"counted on from step 2 of {origin.training.folder}"
    assert samples_of_step(run, 4) == (range(40, 48), known)
    with pytest.raises(UserError, match=r"--step: the run starts after step 2 of"):
        samples_of_step(run, 2)


def test_a_step_that_is_not_there(tmp_path: Path) -> None:
    run = config(tmp_path)
    with pytest.raises(UserError, match=r"--step: 41 is after the last step of the run, 40"):
        samples_of_step(run, 41)
    Run(run).train(range(3, 5), 16)
    with pytest.raises(UserError, match=r"has no record of step 2, only of later ones"):
        samples_of_step(run, 2)


@pytest.mark.parametrize(
    "change", [{"seconds": 1e300}, {"consumed_tokens": 0}, {"consumed_samples": "x"}]
)
def test_a_record_that_makes_no_sense(tmp_path: Path, change: dict[str, Any]) -> None:
    run = config(tmp_path)
    run.training.folder.mkdir()
    path = run.training.folder / "metrics.jsonl"
    path.write_text(json.dumps({**record(3).to_json(), **change}) + "\n")
    with pytest.raises(UserError, match=r"the record of step 3 is not that of a step"):
        samples_of_step(run, 3)
