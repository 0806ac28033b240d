"""`keel runs`: what a folder says of its run, and what it does not."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from keel_megatron.checkpoint import folder as checkpoints
from keel_megatron.checkpoint.manifest import FileRecord, write_json, write_manifest
from keel_megatron.cluster import watchdog
from keel_megatron.config.load import dump_config
from keel_megatron.dashboard import runs
from keel_megatron.dashboard.folders import find_runs
from keel_megatron.dashboard.runs import VERDICTS, RunStatus, look
from keel_megatron.dashboard.runs_table import runs_table
from keel_megatron.errors import UserError
from keel_megatron.runtime import exit_codes
from keel_megatron.tracking.metrics import MetricsFile
from keel_megatron.tracking.records import ValidationRecord
from tests.calls import calls_of
from tests.config import test_strangers
from tests.settings import small_config
from tests.tracking.samples import record

NOW = 1_800_000_000.0


def make_run(parent: Path, name: str, steps: int = 10, silent: float = 5.0, **last: Any) -> Path:
    """A run of 100 steps after some of them, whose last sign of life is `silent` seconds old."""
    run = parent / name
    run.mkdir(parents=True)
    config = small_config(training__name=name, training__steps=100)
    (run / "config.yaml").write_text(dump_config(config))
    with MetricsFile(run / "metrics.jsonl") as metrics:
        for step in range(1, steps + 1):
            values = last if step == steps else {}
            metrics.write(record(step, **{"loss": 5.0 - step / 100, "seconds": 2.0, **values}))
        metrics.write(ValidationRecord(steps, 4.5, 16, 512))
    age(run, silent)
    return run


def age(run: Path, silent: float) -> None:
    """Make everything in a run's folder so old."""
    for path in sorted(run.rglob("*"), reverse=True):
        os.utime(path, (NOW - silent, NOW - silent))


def log(run: Path, *lines: str, silent: float = 5.0) -> None:
    when = datetime.fromtimestamp(NOW - silent, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    (run / "log.txt").write_text("".join(f"{when} {line}\n" for line in lines))
    os.utime(run / "log.txt", (NOW - silent, NOW - silent))


def save(run: Path, step: int) -> Path:
    """A checkpoint's folder whose names and sizes are right."""
    path = checkpoints.step_folder(run, step)
    path.mkdir(parents=True)
    files: dict[str, FileRecord] = {}
    for name in ("state.json", "index.json", "metadata.json", "config.yaml"):
        files[name] = write_json(path / name, {})
    write_manifest(path, step, files)
    return path


def only(run: Path) -> RunStatus:
    (status,) = look([run], NOW)
    return status


def test_a_run_that_has_just_made_a_step_is_running(tmp_path: Path) -> None:
    status = only(make_run(tmp_path, "young"))
    assert (status.state, status.step, status.steps) == ("running", 10, 100)
    assert status.loss == pytest.approx(4.9)
    assert status.validation_loss == 4.5
    assert status.tokens_per_second == pytest.approx(1000.0)
    assert status.seconds_left == pytest.approx(90 * 2.0)
    assert status.problems == []


@pytest.mark.parametrize(
    ("silent", "state"), [(29.0, "running"), (40.0, "silent"), (359.0, "silent"), (361.0, "lost")]
)
def test_silence_is_judged_by_what_the_watchdog_would_allow(
    tmp_path: Path, silent: float, state: str
) -> None:
    """The watchdog of these settings acts after 300 s, and a minute is left to it."""
    status = only(make_run(tmp_path, "quiet", silent=silent))
    assert status.state == state
    assert bool(status.problems) == (state != "running")


def test_a_process_of_this_machine_that_writes_the_metrics_is_alive(tmp_path: Path) -> None:
    run = make_run(tmp_path, "slow", silent=1000.0)
    assert only(run).state == "lost"
    with (run / "metrics.jsonl").open("a"):
        status = only(run)
    assert status.state == "running"
    assert status.problems == ["no step for 16m 40s"]


@pytest.mark.parametrize(("mode", "state"), [("a", "running"), ("r", "lost")])
def test_the_writer_may_have_any_name_and_a_reader_is_not_the_run(
    tmp_path: Path, mode: str, state: str
) -> None:
    run = make_run(tmp_path, "slow", silent=1000.0)
    with (
        (run / "metrics.jsonl").open(mode) as file,
        subprocess.Popen(["sleep", "60"], stdin=file) as other,
    ):
        file.close()
        try:
            assert only(run).state == state
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("code", "state", "detail"),
    [
        (exit_codes.DONE, "finished", ""),
        (exit_codes.SAVED, "saved", ""),
        (143, "saved", "SIGTERM"),
        (130, "saved", "SIGINT"),
        (9, "failed", ""),
        (exit_codes.DIVERGED, "failed", ""),
    ],
)
def test_the_exit_code_is_believed(tmp_path: Path, code: int, state: str, detail: str) -> None:
    run = make_run(tmp_path, "ended", silent=1.0)
    exit_codes.write(run, code)
    status = only(run)
    assert (status.state, status.detail) == (state, detail)
    assert status.seconds_left is None


def test_an_error_at_the_end_of_the_log_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, "broken")
    log(
        run,
        "keel: 16 sub-layers",
        "Traceback (most recent call last):",
        '  File "loop.py", line 1, in run',
        "RuntimeError: out of memory",
        "MLflow did not get 3 of 10 records",
    )
    status = only(run)
    assert (status.state, status.problems) == ("failed", ["RuntimeError: out of memory"])
    log(run, "error: data.text: there is no text")
    assert only(run).problems == ["data.text: there is no text"]


def test_an_error_of_an_earlier_start_is_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, "again")
    log(run, "error: data.text: there is no text", silent=60.0)
    assert only(run).state == "running"


def test_a_verdict_of_the_watchdog_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, "hung", silent=500.0)
    hang = run / watchdog.FOLDER / "20261125-000000"
    hang.mkdir(parents=True)
    (hang / "verdict.txt").write_text("watchdog: rank 1 gives no answer\n")
    assert hang / "verdict.txt" in run.glob(VERDICTS)
    age(run, 400.0)
    status = only(run)
    assert (status.state, status.problems) == ("hung", ["watchdog: rank 1 gives no answer"])


def test_the_newest_good_checkpoint_is_shown_and_damaged_ones_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, "damaged")
    save(run, 4)
    (save(run, 8) / "index.json").write_text("{")
    status = only(run)
    assert status.checkpoint == 4
    assert status.problems[0].startswith("step_00000008 is damaged: index.json")


def test_what_is_wrong_with_the_training_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, "sick", loss=float("nan"), skipped_steps=3)
    log(run, "guard, step 9 (skip): the loss is nan; from sub-layer 3")
    assert only(run).problems == [
        "the loss is nan",
        "the updates of 3 step(s) were skipped",
        "guard, step 9 (skip): the loss is nan; from sub-layer 3",
    ]
    assert json.loads(json.dumps(only(run).to_json(), allow_nan=False))["loss"] == "nan"


def test_a_complete_run_is_finished_without_its_exit_code(tmp_path: Path) -> None:
    run = make_run(tmp_path, "whole", steps=100, silent=9000.0)
    assert only(run).state == "lost"
    save(run, 100)
    assert only(run).state == "finished"


def test_runs_are_found_and_what_is_none_is_refused(tmp_path: Path) -> None:
    first, second = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    (tmp_path / "notes").mkdir()
    assert find_runs([tmp_path, first]) == [first, second]
    with pytest.raises(UserError, match="contains no runs"):
        find_runs([tmp_path / "notes"])
    with pytest.raises(UserError, match="does not exist"):
        find_runs([tmp_path / "nowhere"])


def test_the_table_fits_eighty_columns_and_has_the_problems_below(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "demo"), make_run(tmp_path, "keel_512_40b", silent=7200.0)]
    save(runs[0], 8)
    age(runs[0], 5.0)
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(runs_table(look(runs, NOW)))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[1].split()[:5] == ["demo", "running", "10/100", "4.9000", "1,000"]
    assert lines[1].split()[5:] == ["3m", "00s", "8,", "5s", "ago"]
    assert lines[2].startswith("keel_512_40b  lost")
    assert lines[4].startswith("keel_512_40b: no output for 2h 00m: it was killed")


def test_the_work_is_that_of_the_last_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the metrics are; so fifty runs take a fraction of a second."""
    monkeypatch.setattr(runs, "_held_metrics", set)  # this machine's processes
    short, long = make_run(tmp_path, "short", steps=1000), make_run(tmp_path, "long", steps=1000)
    whole = (long / "metrics.jsonl").read_text()
    (long / "metrics.jsonl").write_text(20 * whole)
    (first,), few = calls_of(lambda: look([short]))
    (second,), many = calls_of(lambda: look([long]))
    assert (first.step, second.step) == (1000, 1000)
    assert many == pytest.approx(few, rel=0.02)
    assert few < 50_000


def test_a_field_of_a_wrong_type_costs_a_line(tmp_path: Path) -> None:
    """A hand has edited one run's files; the others are listed all the same."""
    run, other = make_run(tmp_path, "edited"), make_run(tmp_path, "other")
    for name, old, new in (
        ("metrics.jsonl", '"step": 10, "loss": 4.9', '"step": 10, "loss": null'),
        ("config.yaml", "steps: 100", "steps: many"),
        ("config.yaml", "timeout_seconds: 600.0", "timeout_seconds: [1]"),
    ):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))
    age(run, 500.0)
    found = {status.name: status for status in look([run, other], NOW)}
    assert (found["edited"].step, found["edited"].steps) == (9, None)
    assert found["edited"].problems[1:] == [
        "config.yaml: training.steps must be a number, not 'many'",
        "config.yaml: parallel.timeout_seconds must be a number, not [1]",
        "metrics.jsonl: loss of step 10 is not a number: not counted",
    ]
    assert found["other"].problems == []
    Console(file=open(os.devnull, "w")).print(runs_table(list(found.values())))  # noqa: SIM115


def test_a_run_that_diverges_is_shown_at_its_own_step(tmp_path: Path) -> None:
    """With the loss that it has; but a time or a step of such a size is not counted with."""
    large = {"loss": 4.9e30, "grad_norm": math.inf, "learning_rate": 9.0e29}
    run = make_run(tmp_path, "diverges", **large)
    wrong = make_run(tmp_path, "wrong", tokens_per_second=math.inf)
    found = {status.name: status for status in look([run, wrong], NOW)}
    assert (found["diverges"].step, found["diverges"].loss) == (10, 4.9e30)
    assert found["diverges"].problems == ["the gradient norm is inf"]
    assert found["wrong"].step == 9
    assert found["wrong"].problems == [
        "metrics.jsonl: tokens_per_second of step 10 is not finite: not counted"
    ]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(runs_table(list(found.values())))
    assert "4.900e+30" in console.export_text()


def test_a_validation_loss_that_is_not_finite_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path, "diverges")
    with MetricsFile(run / "metrics.jsonl") as metrics:
        metrics.write(ValidationRecord(10, math.nan, 16, 512, {"code": math.nan, "web": 1e20}))
    age(run, 5.0)
    assert math.isnan(only(run).validation_loss or 0.0)
    assert only(run).problems == []
    for step, value in ((11, "NaN"), (12, "1e400"), (13, "-Infinity")):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}, "seconds": {value}}}\n')
        wrong = f"metrics.jsonl: seconds of step {step} is not finite: not counted"
        assert only(run).problems == [wrong]


@pytest.mark.security
def test_one_hostile_folder_is_one_line(tmp_path: Path) -> None:
    """Every kind of it beside a good run, which is shown as ever."""
    good = make_run(tmp_path, "good")

    def sparse(path: Path) -> None:
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(200 << 30)

    def fifo(path: Path) -> None:
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    names = ("config.yaml", "metrics.jsonl", "log.txt", exit_codes.FILE)
    for name in names:
        for kind in (sparse, fifo):
            kind(make_run(tmp_path, f"{kind.__name__}-{name}") / name)
    bomb = make_run(tmp_path, "bomb")
    (bomb / "config.yaml").write_text(test_strangers.MERGES)
    (make_run(tmp_path, "deep") / "config.yaml").write_text("[" * 500_000)
    wrong = make_run(tmp_path, "wrong")
    (wrong / "config.yaml").write_text("training: {steps: many, hang_timeout: [1]}")
    with (wrong / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "loss": "x", "seconds": null, "grad_norm": {}}\n')
        metrics.write('{"step": 1' + "0" * 4000 + ', "loss": 1e400}\n')
    age(wrong, 5.0)
    damaged = save(make_run(tmp_path, "checkpoint"), 10)
    (damaged / "manifest.json").unlink()
    os.mkfifo(damaged / "manifest.json")
    found = look(find_runs([tmp_path]), NOW)
    assert len(found) == 2 + 2 * len(names) + 3
    assert next(run for run in found if run.folder == str(good)).loss == pytest.approx(4.9)
    (hostile,) = [run for run in found if run.name == "checkpoint"]
    assert hostile.problems == [
        "step_00000010 is damaged: manifest.json cannot be read: is not a regular file"
    ]
    problems = {run.name: run.problems for run in found}
    for name, why in (
        ("sparse-config.yaml", "has more than 1,048,576 bytes"),
        ("fifo-config.yaml", "is not a regular file"),
        ("bomb", "it expands to more than 100,000 values"),
        ("deep", "it is nested more than 32 levels deep"),
    ):
        assert f"config.yaml cannot be read: {why}" in problems[name]
    Console(file=io.StringIO(), width=200).print(runs_table(found))


def test_a_folder_that_cannot_be_looked_at_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, "good")
    closed = make_run(tmp_path, "closed")

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    settings = runs.read_settings
    monkeypatch.setattr(
        runs, "read_settings", lambda f: refuse(f) if f.name == "closed" else settings(f)
    )
    found = {run.name: run for run in look([closed, tmp_path / "good"], NOW)}
    assert found["good"].step == 10
    assert found["closed"].state == "unreadable"
    assert found["closed"].problems == ["cannot be read: Permission denied"]


@pytest.mark.security
def test_names_and_messages_do_not_steer_the_terminal(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", silent=9000.0)
    run = run.rename(tmp_path / "evil\x1b[2J\nrun")
    log(run, "error: \x1b]52;c;ZXZpbA==\x07 failed", silent=9000.0)
    shown = io.StringIO()
    Console(file=shown, width=200).print(runs_table(look([run], NOW)))
    assert "\x1b" not in shown.getvalue()
    assert "\\x1b[2J\\nrun" in shown.getvalue()
    assert "\\x1b]52;c;ZXZpbA==\\x07 failed" in shown.getvalue()
