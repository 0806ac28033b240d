"""The loop by itself: which steps are made, validated, saved and reported; no model, no ranks."""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import pytest

from keel_megatron.checkpoint.state import Position
from keel_megatron.data.batches import Batches, ValidationSet
from keel_megatron.errors import DivergedError, UserError
from keel_megatron.runtime import exit_codes
from keel_megatron.tracking.records import EvaluationRecord, StepRecord, ValidationRecord
from keel_megatron.training import diagnose
from keel_megatron.training.guard import Guard
from keel_megatron.training.loop import Loop
from keel_megatron.training.run_state import RunState
from keel_megatron.training.stop import StopRequest
from tests.settings import small_config
from tests.training.fakes import FakeBatches, FakeEngine, FakeSaver, FakeTracker


class Bench:
    """A loop and the parts around it."""

    def __init__(self, losses: list[float] | None = None, **overrides: Any) -> None:
        wanted = {"tracking__depth_every": 0, "schedule__warmup_steps": 0, **overrides}
        self.config = small_config(**wanted)
        self.engine = FakeEngine(self.config, losses)
        self.source, self.saver, self.tracker = FakeBatches(), FakeSaver(), FakeTracker()
        self.guard = Guard(self.config.guard)
        self.state = RunState(self.engine, self.saver, {"guard": self.guard})  # type: ignore[arg-type]
        self.marks: list[str] = []
        self.before: list[int] = []
        self.loop = Loop(
            engine=self.engine,  # type: ignore[arg-type]
            batches=Batches(self.source, [ValidationSet("text", 1000, [1, 2])]),  # type: ignore[arg-type]
            state=self.state,
            guard=self.guard,
            tracker=self.tracker,  # type: ignore[arg-type]
            evaluation=self if self.config.evaluation.every else None,  # type: ignore[arg-type]
            mark=self.marks.append,
            before_step=lambda position, _engine: self.before.append(position.step),
        )

    def run(self, _engine: Any, stop: Any, _mark: Any) -> dict[str, dict[str, float]] | None:
        """As `Evaluation.run`."""
        return None if stop() else {"piqa": {"acc": 0.5}}

    def steps(self, kind: type) -> list[int]:
        return [record.step for record in self.tracker.records if isinstance(record, kind)]

    @property
    def saved(self) -> list[int]:
        return [position.step for position, _extras in self.saver.saved]


def test_intervals_decide_what_is_validated_and_saved() -> None:
    bench = Bench(training__steps=7, training__validate_every=3, checkpoint__every=2)
    assert bench.loop.run(StopRequest()) == exit_codes.DONE
    assert bench.steps(StepRecord) == [1, 2, 3, 4, 5, 6, 7]
    assert bench.steps(ValidationRecord) == [3, 6, 7]
    assert bench.saved == [2, 4, 6, 7]
    assert bench.source.read == bench.before == [0, 1, 2, 3, 4, 5, 6]
    assert bench.loop.validation_loss == 2.0
    assert bench.saver.finished == 1
    assert bench.marks[-2:] == ["step 7", "the validation after step 7"]


def test_intervals_decide_what_is_evaluated_and_the_last_step_is() -> None:
    bench = Bench(training__steps=7, evaluation__every=3, evaluation__tasks=["piqa"])
    assert bench.loop.run(StopRequest()) == exit_codes.DONE
    assert bench.steps(EvaluationRecord) == [3, 6, 7]
    assert "the evaluation after step 3" in bench.marks
    record = bench.tracker.records[3]
    assert isinstance(record, EvaluationRecord)
    assert record.seconds is not None
    assert record.to_json() == {
        "step": 3,
        "evaluation_seconds": record.seconds,
        "evaluation/piqa/acc": 0.5,
    }


def test_a_request_to_stop_during_an_evaluation_ends_it_and_the_run() -> None:
    stop = StopRequest()
    bench = Bench(training__steps=7, evaluation__every=2, evaluation__tasks=["piqa"])

    def mark(what: str) -> None:
        if what == "step 4":
            stop.deadline = 0.0

    bench.loop._mark = mark
    assert bench.loop.run(stop) == exit_codes.SAVED
    assert bench.steps(EvaluationRecord) == [2]
    assert bench.saved == [4]


def test_sources_are_validated_apart_and_weighted_by_their_shares() -> None:
    bench = Bench(training__steps=1)
    bench.loop._batches = Batches(
        bench.source,  # type: ignore[arg-type]
        [ValidationSet("web", 700, [2.0]), ValidationSet("books", 300, [4.0])],  # type: ignore[list-item]
    )
    bench.engine.validate = lambda batches, count: batches[0] * count  # type: ignore[method-assign]
    bench.loop.run(StopRequest())
    (record,) = (one for one in bench.tracker.records if isinstance(one, ValidationRecord))
    assert record.sources == {"web": 2.0, "books": 4.0}
    assert record.validation_loss == bench.loop.validation_loss == pytest.approx(2.6)
    assert record.to_json() == {
        "step": 1,
        "validation_loss": record.validation_loss,
        "consumed_samples": 16,
        "consumed_tokens": 512,
        "validation/web/loss": 2.0,
        "validation/books/loss": 4.0,
    }


def test_a_request_to_stop_ends_it_after_the_step_with_a_checkpoint() -> None:
    bench = Bench(training__steps=7, training__validate_every=1)
    assert bench.loop.run(StopRequest(deadline=0.0)) == exit_codes.SAVED
    assert (bench.steps(StepRecord), bench.steps(ValidationRecord)) == ([1], [])
    assert bench.saved == [1]


def test_the_last_step_leaves_nothing_to_stop() -> None:
    bench = Bench(training__steps=1)
    assert bench.loop.run(StopRequest(deadline=0.0)) == exit_codes.DONE


def test_a_skipped_update_is_counted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "describe", lambda *_arguments: "block 3")
    bench = Bench([1.0, math.nan, 1.0], training__steps=3)
    bench.loop.run(StopRequest())
    assert bench.engine.updates == [True, False, True]
    assert [r.skipped_steps for r in bench.tracker.records if isinstance(r, StepRecord)] == [
        0,
        1,
        1,
    ]
    (said,) = bench.tracker.said
    action = bench.config.guard.action
    assert said == f"guard, step 2 ({action}): loss is nan, its update is skipped; block 3"


def test_a_last_validation_that_is_not_finite_is_no_end() -> None:
    bench = Bench(training__steps=2)
    bench.engine.validation_loss = math.nan
    with pytest.raises(DivergedError, match="the last validation loss is nan"):
        bench.loop.run(StopRequest())
    assert bench.saved == []


def test_a_run_whose_last_save_failed_says_so() -> None:
    bench = Bench(training__steps=1)
    bench.saver.failure = "the disk is full"
    with pytest.raises(UserError, match="the run ends without a checkpoint: the disk is full"):
        bench.loop.run(StopRequest())


def test_however_it_ends_no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last step, by a request to stop, and by an error of the thread that reads batches."""

    def gone(consumed: int, size: int) -> list[Any]:
        raise OSError(f"batch {consumed // size} cannot be read")

    before = threading.active_count()
    Bench(training__steps=3).loop.run(StopRequest())
    Bench(training__steps=3).loop.run(StopRequest(deadline=0.0))
    monkeypatch.setattr(FakeBatches, "micro_batches", staticmethod(gone))
    with pytest.raises(OSError, match="batch 0 cannot be read"):
        Bench(training__steps=3).loop.run(StopRequest())
    assert threading.active_count() == before


def test_the_batch_grows_with_the_samples_consumed() -> None:
    """Whatever the step: a rollback skips samples, and a resume begins in the middle."""
    ramp = {"start": 4, "increment": 4, "samples": 32}
    bench = Bench(training__steps=6, schedule__rampup_batch_size=ramp)
    bench.loop.run(StopRequest())
    ends = [0, 4, 8, 12, 20, 28, 40]
    assert bench.source.samples == [range(a, b) for a, b in itertools.pairwise(ends)]
    steps = [record for record in bench.tracker.records if isinstance(record, StepRecord)]
    assert [record.consumed_samples for record in steps] == ends[1:]
    tokens = [record.tokens_per_second * record.seconds for record in steps]
    assert tokens == pytest.approx([32 * (b - a) for a, b in itertools.pairwise(ends)])
    assert bench.tracker.said == [
        "step 1: the global batch size is 4",
        "step 4: the global batch size is 8",
        "step 6: the global batch size is 12",
    ]

    resumed = Bench(training__steps=6, schedule__rampup_batch_size=ramp)
    resumed.state.position = Position(3, 21)
    resumed.loop.run(StopRequest())
    assert resumed.source.samples == [range(21, 29), range(29, 41), range(41, 57)]


def test_a_run_that_continues_another_has_a_checkpoint_to_roll_back_to() -> None:
    for step, is_saved, expected in ((0, False, [0, 5]), (3, True, [5]), (3, False, [3, 5])):
        bench = Bench(training__steps=5, guard__action="rollback")
        bench.state.position = Position(step, 16 * step)
        bench.state._saved_step = step if is_saved else None
        bench.loop.run(StopRequest())
        assert bench.saved == expected
