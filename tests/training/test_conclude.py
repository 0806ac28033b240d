"""What a run says and draws at its end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from keel_megatron.training import conclude as module
from keel_megatron.training.conclude import conclude
from tests.settings import small_config
from tests.training.fakes import FakeTracker


def test_a_run_that_was_stopped_says_how_to_resume(tmp_path: Path) -> None:
    config, tracker = small_config(training__runs_dir=str(tmp_path)), FakeTracker()
    conclude(config, tracker, 3, math.nan, 2.0)  # type: ignore[arg-type]
    assert tracker.said == [
        "stopped after step 3 of 4, checkpoint written; the same command resumes from there"
    ]


@pytest.mark.parametrize(
    ("loss", "compared"),
    [(1.5, ": 0.500 nats below it"), (2.25, ": 0.250 nats ABOVE it"), (math.nan, "")],
)
def test_a_finished_run_is_compared_with_counting_tokens(
    loss: float, compared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tracker = small_config(training__runs_dir=str(tmp_path)), FakeTracker()
    monkeypatch.setattr(module, "plot_loss", lambda *_arguments: None)
    conclude(config, tracker, 4, loss, 2.0)  # type: ignore[arg-type]
    start = f"validation loss {loss:.3f} nats per token; unigram entropy 2.000"
    assert tracker.said[0] == start + compared
    assert tracker.artifacts == [config.training.folder / "loss.png"]


def test_a_picture_that_cannot_be_drawn_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tracker = small_config(training__runs_dir=str(tmp_path)), FakeTracker()

    def fail(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "plot_loss", fail)
    conclude(config, tracker, 4, math.nan, 2.0)  # type: ignore[arg-type]
    start = f"cannot draw {tmp_path}/test/loss.png: OSError"
    assert any(line.startswith(start) for line in tracker.said)
