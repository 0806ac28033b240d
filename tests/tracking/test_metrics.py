"""metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from keel_megatron.tracking.metrics import MetricsFile, read_metrics
from keel_megatron.tracking.records import StepRecord, ValidationRecord


def record(step: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        grad_norm=0.5,
        learning_rate=1e-3,
        consumed_samples=16 * step,
        consumed_tokens=512 * step,
        tokens_per_second=1000.0,
        tflops_per_device=0.1,
        memory_gb=1.5,
        seconds=0.5,
    )


@given(loss=st.floats())
def test_a_float_comes_back_to_the_last_bit(tmp_path_factory, loss: float) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with MetricsFile(path, None) as metrics:
        metrics.write(record(1, loss))
    (found,) = read_metrics(path)
    assert found["loss"] == loss or (math.isnan(found["loss"]) and math.isnan(loss))


def test_a_line_has_the_keys_that_readers_rely_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, None) as metrics:
        metrics.write(record(1))
        metrics.write(ValidationRecord(1, 2.5, 16, 512))
        # Flushed as it is written, not at the end.
        first, second = read_metrics(path)
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
    ]
    assert second["validation_loss"] == 2.5


def test_resuming_drops_the_steps_that_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, None) as metrics:
        for step in range(1, 6):
            metrics.write(record(step))
    with path.open("a") as stream:
        stream.write('{"step": 6, "lo')  # a kill in the middle of a line
    with MetricsFile(path, resume_step=3) as metrics:
        metrics.write(record(4, loss=9.0))
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 9.0),
    ]
    MetricsFile(path, resume_step=None).close()
    assert read_metrics(path) == []
