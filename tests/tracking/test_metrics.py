"""metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel_megatron.config import UserError
from keel_megatron.tracking.metrics import MetricsFile, read_metrics
from keel_megatron.tracking.records import CheckpointRecord, EvaluationRecord, ValidationRecord
from tests.disk import Disk
from tests.tracking.samples import record


def same(here: float, there: float) -> bool:
    """Equal to the last bit, the sign of zero included; NaN is NaN."""
    if math.isnan(here):
        return math.isnan(there)
    return here == there and math.copysign(1, here) == math.copysign(1, there)


@settings(deadline=None)
@given(loss=st.floats(), norm=st.floats(), rate=st.floats())
def test_a_float_comes_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, loss: float, norm: float, rate: float
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(record(1, loss, grad_norm=norm, learning_rate=rate))
    (found,) = read_metrics(path)
    assert same(found["loss"], loss)
    assert same(found["grad_norm"], norm)
    assert same(found["learning_rate"], rate)


@pytest.mark.parametrize(
    ("loss", "written"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")]
)
def test_a_loss_that_is_not_finite_says_which(tmp_path: Path, loss: float, written: str) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(record(1, loss))
    assert f'"loss": {written},' in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_s_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "x.jsonl"
    folder.mkdir()
    with pytest.raises(UserError, match=r"has no metrics.jsonl"):
        read_metrics(folder)
    with MetricsFile(folder / "metrics.jsonl") as metrics:
        metrics.write(record(1))
    assert [line["step"] for line in read_metrics(folder)] == [1]


def test_a_line_has_the_keys_that_readers_rely_on_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(record(1))
        metrics.write(ValidationRecord(1, 2.5, 16, 512))
        first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(first) == [
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "consumed_samples",
        "consumed_tokens",
        "tokens_per_second",
        "tflops_per_device",
        "memory_gb",
        "seconds",
        "skipped_steps",
        "data_seconds",
        "time",
    ]
    assert 1.7e12 < second.pop("time") < 1e14, "milliseconds since 1970"
    assert second == {
        "step": 1,
        "validation_loss": 2.5,
        "consumed_samples": 16,
        "consumed_tokens": 512,
    }


def test_an_evaluation_goes_with_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    results = {"piqa": {"acc": 0.5, "bits_per_byte": 1.25}, "own": {"bits_per_byte": 2.0}}
    with MetricsFile(path) as metrics:
        for step in (4, 8):
            metrics.write(record(step))
            metrics.write(EvaluationRecord(step, results))
        metrics.rewind(4)
    _step, evaluation = read_metrics(path)
    del evaluation["time"]
    assert evaluation == {
        "step": 4,
        "evaluation/piqa/acc": 0.5,
        "evaluation/piqa/bits_per_byte": 1.25,
        "evaluation/own/bits_per_byte": 2.0,
    }


@settings(deadline=None)
@given(
    steps=st.lists(st.integers(1, 30), unique=True).map(sorted),
    resumed=st.integers(0, 30),
    torn=st.integers(0, 60),
)
def test_rewinding_keeps_the_steps_up_to_it_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], resumed: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for step in steps:
            metrics.write(record(step, 1 / 3))
    before = path.read_bytes().splitlines(keepends=True)
    with path.open("a") as stream:  # a kill in the middle of a line
        stream.write(json.dumps(record(31).to_json())[:torn])
    with MetricsFile(path) as metrics:
        metrics.rewind(resumed)
        kept = [line for step, line in zip(steps, before, strict=True) if step <= resumed]
        assert path.read_bytes() == b"".join(kept)
        metrics.write(record(resumed + 1, 9.0))
    assert [line["step"] for line in read_metrics(path)] == [
        *(step for step in steps if step <= resumed),
        resumed + 1,
    ]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "\0\0\0\0", '{"step": 2}'])
def test_what_a_kill_left_is_not_glued_to_the_next_line(tmp_path: Path, tail: str) -> None:
    """The third is a whole record that only lacks the end of its line: it is kept."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + tail)
    found = [1, 2] if tail == '{"step": 2}' else [1]
    assert [line["step"] for line in read_metrics(path)] == found
    with MetricsFile(path) as metrics:
        metrics.write(record(3))
    assert [line["step"] for line in read_metrics(path)] == [*found, 3]


def test_a_record_of_an_earlier_step_stays_wherever_it_stands(tmp_path: Path) -> None:
    """A save in the background is noted after the steps that were taken meanwhile."""
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for step in (1, 2, 3):
            metrics.write(record(step))
        metrics.write(CheckpointRecord(2, 0.1, 0.2, 100))
        metrics.write(record(4))
        metrics.rewind(2)
        metrics.write(record(3))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 2, 3]


def test_a_full_disk_costs_no_record_and_does_not_hinder_a_rewind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, disk, said = tmp_path / "metrics.jsonl", Disk(monkeypatch), list[str]()
    with MetricsFile(path, said.append) as metrics:
        for step in range(1, 9):
            if step == 3:
                disk.room = 100
            metrics.write(record(step))
        assert [line["step"] for line in read_metrics(path)] == [1, 2]
        metrics.rewind(6)
        metrics.write(record(7))
        assert [line["step"] for line in read_metrics(path)] == [1, 2]
        metrics.rewind(1)
        disk.room = 1 << 40
        metrics.write(record(2))
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert len(said) == 2


@pytest.mark.parametrize("line", ["scribble", "[1]", '{"loss": 1.0}'])
def test_a_spoilt_middle_is_an_error_and_nothing_is_dropped(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    path.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not the record of a step"):
        read_metrics(path)
    with MetricsFile(path) as metrics, pytest.raises(UserError, match="line 2"):
        metrics.rewind(1)
    assert path.read_text() == text


def test_a_file_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_starting_anew_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(ValidationRecord(0, 2.5, 0, 0))
        metrics.rewind(None)
        metrics.write(record(1))
    assert [line["step"] for line in read_metrics(path)] == [1]
