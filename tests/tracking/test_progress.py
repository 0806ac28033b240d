"""What rank 0 shows, without a terminal and on one."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from keel_megatron.config.batch_sizes import BatchSizes
from keel_megatron.tracking.progress import Progress, duration
from keel_megatron.tracking.records import ValidationRecord
from tests.disk import Disk
from tests.tracking.samples import record

# Two seconds a step by the clock, whatever the records say; of eight lines the second half.
GOLDEN = """\
building the model [brackets] :smile: stay
      step      loss  grad norm  learning rate   tokens/s  time left
    2/3000    8.2500      0.500      1.000e-03      1,000     1h 39m
step 3: validation loss 7.1250
    4/3000       nan        inf      1.000e-03  1,234,568     1h 39m
 3000/3000    1.0000      0.500      1.000e-03      1,000     0m 00s
"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(progress: Progress, clock: Clock) -> None:
    progress.say("building the model [brackets] :smile: stay")
    for step, loss in ((1, 9.0), (2, 8.25), (3, 8.0), (4, float("nan")), (3000, 1.0)):
        clock.now = 2.0 * step
        strange = {"grad_norm": float("inf"), "tokens_per_second": 1234567.8} if step == 4 else {}
        progress.step(record(step, loss, **strange))
        if step == 3:
            progress.validation(ValidationRecord(3, 7.125, 48, 1536))


def test_plain_lines_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it: still no terminal
    stream, clock = io.StringIO(), Clock()
    progress = Progress(3000, tmp_path / "log.txt", log_every=2, stream=stream, clock=clock)
    run(progress, clock)
    progress.close()
    assert stream.getvalue() == GOLDEN
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in log] == GOLDEN.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in log)


def test_the_time_left_counts_the_sequences_of_a_ramp_up(tmp_path: Path) -> None:
    """A second for each; after 3 steps of 4 come 8, 8, 12 and two of 16."""
    stream, clock = io.StringIO(), Clock()
    sizes = BatchSizes(full=16, start=4, increments=3, samples=32)
    progress = Progress(8, tmp_path / "log.txt", 1, stream, clock, sizes)
    for step in (1, 2, 3):
        clock.now = 4.0 * step
        progress.step(record(step, consumed_samples=4 * step, seconds=4.0))
    progress.close()
    left = [line.split()[-2:] for line in stream.getvalue().splitlines()[1:]]
    assert left == [["1m", "08s"], ["1m", "04s"], ["1m", "00s"]]


def test_a_header_comes_now_and_then_and_columns_stay_in_line(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(10_000_000, tmp_path / "log.txt", log_every=1, stream=stream)
    for step in range(9_999_960, 10_000_001):
        progress.step(record(step, tokens_per_second=123_456_789.0))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [number for number, line in enumerate(lines) if "step" in line] == [0, 21, 42]
    assert lines[1].split()[:5] == [
        "9999960/10000000",
        "1.0000",
        "0.500",
        "1.000e-03",
        "123,456,789",
    ]
    assert len({line.index(".") for line in lines if "step" not in line}) == 1


def test_the_log_is_added_to_and_outlives_the_reader_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("from before\n")
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1)
    progress = Progress(2, tmp_path / "log.txt", log_every=1, stream=stream)
    progress.say("two\nlines")
    progress.step(record(1))
    progress.close()
    progress.say("after the end: shown at most")
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert log[0] == "from before"
    assert [line.split(" ", 1)[1] for line in log[1:3]] == ["two", "lines"]
    assert log[4].split()[1] == "1/2"
    assert len(log) == 5


def test_text_that_the_stream_cannot_hold_is_no_error(tmp_path: Path) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    progress = Progress(1, tmp_path / "log.txt", log_every=1, stream=stream)
    progress.say("naïve")
    progress.close()
    assert raw.getvalue() == b"na?ve\n"
    assert "naïve" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_several_threads_may_speak(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(1, tmp_path / "log.txt", log_every=1, stream=stream)

    def speak(name: str) -> None:
        for number in range(50):
            progress.say(f"{name} {number} {'x' * 50}")

    threads = [threading.Thread(target=speak, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert sorted(lines) == sorted(f"{n} {i} {'x' * 50}" for n in "abcd" for i in range(50))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0m 00s"), (59.7, "1m 00s"), (3599, "59m 59s"), (3600, "1h 00m"), (200000, "2d 07h")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


PROGRAM = """
import os, signal, sys
from pathlib import Path
from keel_megatron.mlflow_delivery.reporting import open_tracker
from keel_megatron.tracking.records import ValidationRecord
from tests.settings import small_config
from tests.tracking.samples import record

run = small_config(training__runs_dir=sys.argv[1], training__steps=100, tracking__log_every=2)
with open_tracker(run, 0, None) as tracker:
    for step in range(1, 4):
        tracker.step(record(step, loss=1.2345))
    tracker.step(ValidationRecord(3, 2.5678, 48, 1536, {"web": 2.5, "books": 2.75}))
    tracker.say("said above [brackets stay]")
    print("printed by someone else")
    if sys.argv[2] == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    if sys.argv[2] == "error":
        raise RuntimeError("the loss is a teapot")
    tracker.step(record(100, loss=1.2345))
"""


def on_a_terminal(tmp_path: Path, ending: str) -> tuple[int, str]:
    """Exit status and what a terminal of 100 columns received."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), ending],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(slave)
    received = b""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 0.2)[0]:
            continue
        try:
            received += os.read(master, 65536)
        except OSError:  # the other side is closed
            break
    os.close(master)
    return process.wait(timeout=300), received.decode()


@pytest.mark.parametrize("ending", ["finish", "interrupt", "error"])
def test_a_terminal_gets_live_lines_and_is_given_back(tmp_path: Path, ending: str) -> None:
    status, shown = on_a_terminal(tmp_path, ending)
    assert status == {"finish": 0, "interrupt": -signal.SIGINT, "error": 1}[ending]
    assert shown.count("Traceback") == (0 if ending == "finish" else 1), shown
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "said above [brackets stay]" in text
    assert "printed by someone else" in text
    assert "loss 1.2345  validation 2.5678  grad norm 0.500  lr 1.00e-03" in text
    assert "step 1/100 " in text
    assert f"step {100 if ending == 'finish' else 3}/100 " in text, "the last state is left there"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"
    if ending != "finish":
        assert shown.rindex("\x1b[?25h") < shown.index("Traceback")
    log = (tmp_path / "test" / "log.txt").read_text()
    assert "2/100    1.2345" in log
    assert "step 3: validation loss 2.5678 (web 2.5000, books 2.7500)\n" in log
    assert "\x1b" not in log
    assert ("the loss is a teapot" in log) == (ending == "error")
    assert ("interrupted" in log) == (ending == "interrupt")


def test_a_full_disk_costs_no_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, stream = Disk(monkeypatch), io.StringIO()
    progress = Progress(10, tmp_path / "log.txt", log_every=1, stream=stream)
    for number in range(8):
        disk.room = 30 if 2 <= number < 6 else 1 << 40
        progress.say(f"message {number}")
    progress.close()
    log = [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert log == [f"message {number}" for number in range(8)]
    assert stream.getvalue().count("cannot write") == 1
    assert stream.getvalue().count("is written again") == 1


def test_a_full_disk_under_standard_output_does_not_silence_it_for_good(tmp_path: Path) -> None:
    class Full(io.StringIO):
        is_full = True

        def flush(self) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")

    stream = Full()
    progress = Progress(10, tmp_path / "log.txt", log_every=1, stream=stream)
    progress.say("lost, or late")
    stream.is_full = False
    progress.say("heard")
    progress.close()
    assert "heard" in stream.getvalue()
