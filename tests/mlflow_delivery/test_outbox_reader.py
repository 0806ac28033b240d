"""What is read of a run's log: every record that stays, in order, whatever ends or is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel_megatron.mlflow_delivery import outbox_reader
from keel_megatron.mlflow_delivery.items import Item
from keel_megatron.mlflow_delivery.outbox_reader import OutboxReader, Waiting
from keel_megatron.tracking.metrics import read_metrics
from keel_megatron.tracking.outbox import EventLog, MeasurementLog
from keel_megatron.tracking.run_log import RunLog
from tests.depth.test_profile import profile
from tests.mlflow_delivery.session import Values


def started(run: Path, name: str = "a", resume: int | None = None) -> RunLog:
    extra = {} if resume is None else {"back_to": resume}
    return RunLog(run, resume, start={"name": name, "target": {}, **extra})


def write(log: RunLog, *steps: int, loss: float = 0.5) -> None:
    for step in steps:
        log.write(Values(step, {"loss": loss}))


def take(reader: OutboxReader) -> list[Item]:
    """Everything that waits, delivered."""
    taken: list[Item] = []
    while batch := reader.batch():
        reader.commit(batch)
        taken += batch
    return taken


def steps(items: list[Item]) -> list[int]:
    return [item.values["step"] for item in items if item.kind == "metrics"]


def kinds(items: list[Item]) -> list[str]:
    return [item.kind for item in items]


def test_items_come_once_and_in_order_and_stay_on_disk(tmp_path: Path) -> None:
    log = started(tmp_path)
    write(log, 1, 2)
    log.event("tags", tags={})
    reader = OutboxReader(tmp_path)
    assert kinds(take(reader)) == ["start", "metrics", "metrics", "tags"]
    write(log, 3)
    log.event("end", status="FINISHED")
    assert kinds(take(reader)) == ["metrics", "end"]
    assert reader.ended
    write(log, 4)
    reader = OutboxReader(tmp_path)
    assert (reader.ended, steps(take(reader))) == (True, [4])
    assert not Waiting.of(tmp_path)
    again = OutboxReader(tmp_path, again=True)
    assert kinds(take(again)) == ["start", *["metrics"] * 4, "tags", "end"]


def test_what_each_record_is_to_mlflow(tmp_path: Path) -> None:
    log = started(tmp_path)
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 5.0, "seconds": 2, "time": 7},
        {
            "step": 1,
            "validation_loss": 4.0,
            "consumed_tokens": 3,
            "time": 8,
            "validation/a/loss": 5.0,
        },
        {"step": 1, "evaluation_seconds": 2, "evaluation/a/acc": 0.5, "time": 8},
        {"step": 2, "loss": "5", "grad_norm": None, "norm": True, "big": 10**400, "time": "now"},
        {"step": -1, "loss": 5.0},
        {"loss": 5.0},
        {"step": 3, "depth": {"gradient_norm": []}, "time": 9},
    ]
    text = [json.dumps(line) for line in lines] + ["[]", "scribble", '"end"']
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n".join(text) + "\n")
    log.write(profile(4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}')  # being written
    (start, *items) = take(OutboxReader(tmp_path))
    found = [(i.values["step"], i.values["time"], i.values["values"]) for i in items]
    assert found[:4] == [
        (1, 7, {"loss": 5.0, "seconds": 2.0}),
        (1, 8, {"validation_loss": 4.0, "validation/a/loss": 5.0}),
        (1, 8, {"evaluation_seconds": 2.0, "evaluation/a/acc": 0.5}),
        (2, start.values["time"], {}),
    ]
    assert [values for _step, _time, values in found[4:-1]] == [{}] * 6
    assert found[-1][2]["depth.stream_rms.max"] == 1.0


def test_records_before_a_cut_come_before_its_event(tmp_path: Path) -> None:
    """Each start's records go to the place that it names."""
    log = started(tmp_path)
    write(log, 1, 2, 3)
    log.event("end", status="KILLED")
    log = started(tmp_path, "b", resume=2)
    write(log, 3, 4)
    log.rewind(3)
    write(log, 4, 5)
    assert Waiting.of(tmp_path).points == 5
    found = take(OutboxReader(tmp_path))
    assert kinds(found) == [
        *("start", "metrics", "metrics", "end", "start", "metrics", "rewind", "metrics", "metrics")
    ]
    assert steps(found) == [1, 2, 3, 4, 5]


def test_a_copy_and_an_earlier_version_s_run_begin_with_their_first_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n')
    assert not Waiting.of(tmp_path)
    assert take(OutboxReader(tmp_path)) == []
    log = started(tmp_path, resume=1)
    write(log, 2)
    assert Waiting.of(tmp_path).points == 1
    assert steps(take(OutboxReader(tmp_path))) == [2]
    assert steps(take(OutboxReader(tmp_path, again=True))) == [1, 2]
    assert steps(take(OutboxReader(tmp_path, again=True, whole=False))) == [2]


def test_again_is_the_run_s_present_mlflow_run(tmp_path: Path) -> None:
    """What was before the last start that began one is another MLflow run's."""
    started(tmp_path, "a").event("tags", tags={})
    started(tmp_path, "b")
    log = started(tmp_path, "c", resume=0)
    write(log, 1)
    reader = OutboxReader(tmp_path, again=True)
    (first,) = reader.batch()
    assert (first.values["name"], reader.again) == ("b", True)
    reader.commit([first])
    assert not reader.again
    reader = OutboxReader(tmp_path)  # killed in the middle of it
    assert kinds(take(reader)) == ["start", "metrics"]


def test_a_cut_while_a_batch_is_read_drops_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = started(tmp_path)
    write(log, 1, 2, 3)
    reader = OutboxReader(tmp_path)
    reader.commit(reader.batch())
    whole, lines = outbox_reader._lines, 0

    def cut(stream: Any, at: int) -> Any:
        nonlocal lines
        for line in whole(stream, at):
            if "metrics.jsonl" in str(stream.name) or isinstance(stream.name, int):
                lines += 1
            if lines == 2:
                log.rewind(1)
                write(log, 2, loss=9.0)
                lines = 99
            yield line

    monkeypatch.setattr(outbox_reader, "_lines", cut)
    found = reader.batch()
    assert [(i.values["step"], i.values["values"]["loss"]) for i in found] == [(1, 0.5)]
    reader.commit(found)
    assert [i.values["values"]["loss"] for i in take(reader) if i.kind == "metrics"] == [9.0]


@pytest.mark.parametrize("change", ["line removed", "cut without an event"])
def test_a_change_that_no_event_tells_has_the_file_delivered_again(
    tmp_path: Path, change: str
) -> None:
    """By hand, as a message advises; or on a disk that had no room for the event."""
    log = started(tmp_path)
    write(log, 1, 2, 3)
    take(OutboxReader(tmp_path))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::2] if change == "line removed" else lines[:1]))
    assert take(OutboxReader(tmp_path)) == []
    write(log, 4, 5, 6)
    found = steps(take(OutboxReader(tmp_path)))
    assert found == [line["step"] for line in read_metrics(path)]
    assert take(OutboxReader(tmp_path)) == []


@pytest.mark.security
def test_a_line_of_nobody_s_writer_is_no_item(tmp_path: Path) -> None:
    log = started(tmp_path)
    write(log, 1)
    events = EventLog(tmp_path)
    events.append("start", name="b", metrics="0")
    events.append("start", name="b", metrics=0, back_to="b")
    events.append("rewind", back_to=0)
    events.append("metrics", step=2, values={"loss": 1.0})
    events.append("end", time="never", status="FINISHED")
    events.append("artifact", path=["a"])
    path = tmp_path / "outbox" / "events.jsonl"
    with path.open("a") as file:
        file.write('[]\n3\n"end"\nnull\n{}\n' + "[" * 9999 + "\n")
    (tmp_path / "outbox" / "system-x.1.jsonl").write_text('{"kind": "end"}\n[]\n')
    note = tmp_path / "outbox" / "delivered.json"
    bad = ['{"metrics": -1, "events": 1e9}', '{"mark": 3, "system": []}', '{"system": {"a": 1}}']
    for text in ("[]", "3", "{", *bad, f'{{"metrics": {10**30}, "mark": [{10**30}, -1]}}'):
        note.write_text(text)
        assert kinds(take(OutboxReader(tmp_path))) == ["start", "metrics"]


def test_measurements_come_last_and_their_oldest_file_may_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path)
    for number in (5, 6):
        lines = [{"kind": "system", "time": number, "values": {"x": float(n)}} for n in range(2)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "outbox" / f"system-a.{number}.jsonl").write_text(text)
    reader = OutboxReader(tmp_path)
    assert kinds(take(reader)) == ["start", *["system"] * 4]
    (tmp_path / "outbox" / "system-a.5.jsonl").unlink()
    MeasurementLog(tmp_path, "a").append({"x": 2.0, "y": 3.0})
    assert str(Waiting.of(tmp_path)) == "2 point(s)"
    assert kinds(take(OutboxReader(tmp_path))) == ["system"]


def test_what_waits_is_counted(tmp_path: Path) -> None:
    log = started(tmp_path)
    write(log, 1, 2)
    assert str(Waiting.of(tmp_path)) == "2 point(s)"
    log.event("artifact", path="loss.png")
    log.event("end", status="FAILED")
    MeasurementLog(tmp_path, "a").append({"x": 1.0, "y": 2.0})
    assert str(Waiting.of(tmp_path)) == "4 point(s), 1 file(s) and the status FAILED"


class Play:
    """A run that writes, cuts, dies and starts; a worker that reads, delivers, notes and dies."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.log = started(run)
        self.step = 0
        self.value = 0
        self.name = 0
        self.reader = OutboxReader(run)
        self.delivered: set[tuple[int, int, float]] = set()
        self.known_cuts = 0

    def write(self, count: int) -> None:
        for _ in range(1 + count % 3):
            self.step, self.value = self.step + 1, self.value + 1
            write(self.log, self.step, loss=float(self.value))

    def rewind(self, back: int) -> None:
        self.step = max(0, self.step - back)
        self.log.rewind(self.step)

    def restart(self, back: int) -> None:
        """Killed, maybe between the cut and its event, and started from a checkpoint or anew."""
        self.log.close()
        if back % 2:
            lines = (self.run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            (self.run / "metrics.jsonl").write_bytes(b"".join(lines[: len(lines) - back // 2]))
            self.step = min(self.step, len(lines))
        self.step = max(0, min(self.step, len(read_metrics(self.run / "metrics.jsonl"))) - back)
        self.name += 1
        anew = self.step == 0 and back % 2
        self.log = started(self.run, f"{self.name}", None if anew else self.step)

    def deliver(self, dies: int) -> None:
        """One batch; the worker may die before it has noted it."""
        batch = self.reader.batch()
        stays = {(line["step"], line["time"], line["loss"]) for line in self.records()}
        points = self.points(batch)
        assert points <= stays, "nothing that a known cut has overtaken"
        self.delivered |= points
        if dies % 3 == 0:
            self.reader = OutboxReader(self.run)
        else:
            self.reader.commit(batch)

    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.run / "metrics.jsonl")

    @staticmethod
    def points(batch: list[Item]) -> set[tuple[int, int, float]]:
        return {
            (i.values["step"], i.values["time"], i.values["values"]["loss"])
            for i in batch
            if i.kind == "metrics"
        }

    def check(self) -> None:
        self.delivered |= self.points(take(self.reader))
        for line in self.records():
            assert (line["step"], line["time"], line["loss"]) in self.delivered
        assert not Waiting.of(self.run)


_ACTS = st.sampled_from(["write", "write", "rewind", "restart", "deliver", "deliver"])
_MOVES = st.lists(st.tuples(_ACTS, st.integers(0, 7)), max_size=30)


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(moves=_MOVES, inner=_MOVES, every=st.integers(2, 5))
def test_every_record_that_stays_is_delivered_and_nothing_that_is_known_to_be_overtaken(
    tmp_path_factory: pytest.TempPathFactory,
    moves: list[tuple[str, int]],
    inner: list[tuple[str, int]],
    every: int,
) -> None:
    """At random, also while the worker is in the middle of reading the file."""
    play = Play(tmp_path_factory.mktemp("run"))
    meanwhile = [move for move in inner if move[0] != "deliver"]
    whole, lines = outbox_reader._lines, 0

    def interrupted(stream: Any, at: int) -> Any:
        nonlocal lines
        for line in whole(stream, at):
            lines += 1
            if meanwhile and lines % every == 0:
                act, number = meanwhile.pop()
                _call(play, act)(number)
            yield line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox_reader, "_lines", interrupted)
        for act, number in moves:
            _call(play, act)(number)
        meanwhile.clear()
        play.check()


def _call(play: Play, act: str) -> Callable[[int], None]:
    call: Callable[[int], None] = getattr(play, act)
    return call
