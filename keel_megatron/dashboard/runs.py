"""State of a run, from its folder alone: the run is not contacted, and nothing is written.

A run records how it ended: in `exit_code`, by an error at the end of log.txt, or by a verdict in
`hangs/`. A killed run records nothing. So:

- `running`: a process on this machine writes its metrics.jsonl; or, since it may run on another
  machine, it wrote a file within the duration of some steps.
- `silent`: neither, but the watchdog's timeout has not passed.
- `lost`: it wrote nothing for longer than the watchdog's timeout: it was killed.
- `unreadable`: its files are not a run's, or this user may not read them.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from keel_megatron.checkpoint import folder as checkpoints
from keel_megatron.checkpoint.manifest import DamagedError, read_manifest
from keel_megatron.config.reading import open_regular, parse_json, read_small
from keel_megatron.config.yaml_text import shown
from keel_megatron.dashboard.folders import read_settings
from keel_megatron.dashboard.time_left import seconds_left
from keel_megatron.runtime import exit_codes
from keel_megatron.tracking.progress import duration

State = Literal[
    "preparing", "running", "silent", "finished", "saved", "failed", "hung", "lost", "unreadable"
]

VERDICTS = "hangs/*/verdict.txt"
"""Files of cluster/watchdog.py; not imported from there, because that imports torch."""

_TAIL_BYTES, _LONGEST_TAIL = 1 << 16, 1 << 24
_DEPTH = '"depth": {'
_IMPLAUSIBLE = 10**15
_UNBOUNDED = ("loss", "validation_loss", "grad_norm", "learning_rate")
_STEPS_AVERAGED = 20
_QUIET_STEPS = 5
_QUIET_SECONDS = 30.0
_WATCHDOG_SECONDS = 300.0
"""Timeout of the watchdog if config.yaml does not have it."""
_WATCHDOG_GRACE = 60.0
_SETTINGS = (
    ("training", "steps"),
    ("training", "hang_timeout"),
    ("parallel", "timeout_seconds"),
)
_SIGNS = ("metrics.jsonl", "log.txt", "config.yaml", "checkpoints")
_LOG_LINE = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (.*)$")
_ERROR = re.compile(r"^(error: |Traceback \(most recent call last\))")


@dataclass(frozen=True)
class RunStatus:
    """State of a run."""

    name: str
    folder: str
    state: State
    """The module's docstring defines them."""
    detail: str = ""
    """The signal that ended it, if one did."""
    step: int = 0
    """The last finished step; 0 = none yet."""
    steps: int | None = None
    """Steps of the whole run."""
    loss: float | None = None
    """Training loss of that step, nats per token."""
    validation_loss: float | None = None
    """The latest, nats per token."""
    tokens_per_second: float | None = None
    """Mean over the last steps."""
    seconds_left: float | None = None
    """Estimate from the last steps; None if it does not run."""
    checkpoint: int | None = None
    """Step of the newest checkpoint whose names and sizes are right."""
    checkpoint_age: float | None = None
    """Seconds since it was complete."""
    seconds_silent: float = 0.0
    """Seconds since its last activity."""
    problems: list[str] = field(default_factory=list)
    """Problems, one line each."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name; a non-finite loss is text, as JSON has no number for it."""

        def plain(value: Any) -> Any:
            bad = isinstance(value, float) and not math.isfinite(value)
            return str(value) if bad else value

        return {name: plain(value) for name, value in asdict(self).items()}


def look(runs: list[Path], now: float | None = None) -> list[RunStatus]:
    """States of runs, the most recently active first.

    Args:
        runs: their folders.
        now: seconds since 1970; None: the current time.
    """
    held = _held_metrics()
    instant = time.time() if now is None else now
    found = [_look_safely(run, held, instant) for run in runs]
    return sorted(found, key=lambda status: status.seconds_silent)


def _look_safely(run: Path, held: set[Path], now: float) -> RunStatus:
    """`_look` for an untrusted folder: an error becomes a problem of this run."""
    try:
        os.listdir(run)
        return _look(run, (run / "metrics.jsonl").resolve() in held, now)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except Exception as error:  # a damaged run does not hide the others
        problem = f"its files are not those of a run ({type(error).__name__}: {error})"
    silent = max(0.0, now - _last_sign(run))
    return RunStatus(run.name, str(run), "unreadable", problems=[problem], seconds_silent=silent)


def _look(run: Path, is_held: bool, now: float) -> RunStatus:
    saved, settings, wrong = _settings(run)
    records, bad_record = _last_records(run / "metrics.jsonl")
    wrong += bad_record
    recent = [record for record in records if "loss" in record][-_STEPS_AVERAGED:]
    validation = next((r["validation_loss"] for r in records[::-1] if "validation_loss" in r), None)
    last = recent[-1] if recent else {}
    step, steps = last.get("step", 0), settings.get("steps")
    seconds = [record["seconds"] for record in recent if "seconds" in record]
    silent = max(0.0, now - _last_sign(run))
    checkpoint, damaged = _newest_checkpoint(run)
    log = _log_tail(run / "log.txt")
    told = _told(run, log, step, steps, checkpoint)
    state, detail, cause = told or _guessed(settings, step, seconds, silent, is_held)
    alive = state in ("running", "silent")
    return RunStatus(
        name=run.resolve().name,
        folder=str(run),
        state=state,
        detail=detail,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        validation_loss=validation,
        tokens_per_second=_mean_speed(recent),
        seconds_left=seconds_left(recent, steps, saved) if alive else None,
        checkpoint=checkpoint,
        checkpoint_age=_age(run, checkpoint, now),
        seconds_silent=silent,
        problems=[*([cause] if cause else []), *wrong, *damaged, *_of_training(last, log)],
    )


def _told(
    run: Path, log: list[tuple[float, str]], step: int, steps: int | None, checkpoint: int | None
) -> tuple[State, str, str] | None:
    """State, detail and problem that the run recorded at its end; None if it recorded none."""
    code = _exit_code(run)
    if code == exit_codes.DONE:
        return "finished", "", ""
    if code == exit_codes.SAVED:
        return "saved", "", ""
    if code is not None and code in exit_codes.FINAL and code > 128:
        return "saved", signal.Signals(code - 128).name, ""
    if code == exit_codes.DIVERGED:
        why = _last_error(log, 0.0) or "training has diverged"
        return "failed", "", f"{why} (code {code})"
    if code is not None:
        return "failed", "", f"it ended with code {code}"
    # Files of an earlier start are older than those of the latest one.
    since = _modified(run / "metrics.jsonl")
    verdict = max(run.glob(VERDICTS), key=_modified, default=None)
    if verdict is not None and _modified(verdict) >= since:
        return "hung", "", _verdict(verdict)
    error = _last_error(log, since)
    if error is not None:
        return "failed", "", error
    if steps is not None and step >= steps and checkpoint == step:
        return "finished", "", ""
    return None


def _guessed(
    settings: dict[str, float], step: int, seconds: list[float], silent: float, is_held: bool
) -> tuple[State, str, str]:
    """The same for a run without a recorded end, from the time since its last activity."""
    patience = max(_QUIET_SECONDS, _QUIET_STEPS * max(seconds, default=0.0))
    wait = duration(silent)
    if silent <= patience:
        return ("running" if step else "preparing"), "", ""
    if is_held:
        slow = f"no step for {wait}" if step else ""
        return ("running" if step else "preparing"), "", slow
    if silent <= _watchdog_seconds(settings) + _WATCHDOG_GRACE:
        return "silent", "", f"no output for {wait}, and no process on this machine writes it"
    return "lost", "", f"no output for {wait}: it was killed; the same command resumes it"


def _settings(run: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """config.yaml, its numeric settings that are used here, and problems with them."""
    saved, found, wrong = {}, {}, []
    try:
        saved = read_settings(run)
    except ValueError as error:
        wrong.append(str(error))
    for section, name in _SETTINGS:
        value = saved.get(section, {}).get(name)
        if _is_number(value):
            found[name] = value
        elif value is not None:
            wrong.append(f"config.yaml: {section}.{name} must be a number, not {shown(value)}")
    return saved, found, wrong


def _is_number(value: Any) -> bool:
    """Whether it is a finite number of plausible size."""
    return type(value) in (int, float) and abs(value) < _IMPLAUSIBLE  # False for NaN


def _fault(name: str, value: Any) -> str | None:
    """Why a record's field is no usable number; those of a diverging run may have any value."""
    unbounded = name in _UNBOUNDED or name.endswith("/loss")
    if _is_number(value) or (unbounded and type(value) is float):
        return None
    if type(value) not in (int, float):
        return "not a number"
    return "too large" if abs(value) < math.inf else "not finite"  # NaN is not below it


def _watchdog_seconds(settings: dict[str, float]) -> float:
    """Seconds after which the watchdog, or a collective's timeout, ends an inactive run."""
    timeout = settings.get("timeout_seconds", 2 * _WATCHDOG_SECONDS)
    chosen = settings.get("hang_timeout")
    if chosen == 0:
        return float(timeout)
    return float(timeout / 2 if chosen is None else chosen)


def _of_training(last: dict[str, Any], log: list[tuple[float, str]]) -> list[str]:
    """Problems of the training itself."""
    found = []
    skipped = last.get("skipped_steps", 0)
    for field_name, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        value = last.get(field_name, 0.0)
        if not math.isfinite(value):
            found.append(f"the {name} is {value}")
    guard = [text for _time, text in log if text.startswith("guard, step ")]
    if skipped:
        found.append(f"the updates of {skipped} step(s) were skipped")
    if guard:
        found.append(guard[-1])
    return found


def _newest_checkpoint(run: Path) -> tuple[int | None, list[str]]:
    """The newest checkpoint with correct names and sizes, and problems with newer ones."""
    damaged = []
    for step in reversed(checkpoints.steps(run)):
        path = checkpoints.step_folder(run, step)
        try:
            read_manifest(path)
        except DamagedError as error:
            damaged.append(f"{path.name} is damaged: {error}")
            continue
        return step, damaged
    return None, damaged


def _age(run: Path, checkpoint: int | None, now: float) -> float | None:
    if checkpoint is None:
        return None
    return max(0.0, now - _modified(checkpoints.step_folder(run, checkpoint)))


def _mean_speed(records: list[dict[str, Any]]) -> float | None:
    """Tokens per second over these steps."""
    timed = [r for r in records if r.get("tokens_per_second") and r.get("seconds")]
    seconds = sum(record["seconds"] for record in timed)
    tokens = sum(record["tokens_per_second"] * record["seconds"] for record in timed)
    return tokens / seconds if seconds else None


def _exit_code(run: Path) -> int | None:
    try:
        return int(read_small(run / exit_codes.FILE, 64))
    except (OSError, ValueError):
        return None


def _verdict(path: Path) -> str:
    try:
        return read_small(path, _TAIL_BYTES).decode(errors="replace").strip()
    except OSError as error:
        return f"{path}: {error.strerror}"


def _last_error(log: list[tuple[float, str]], since: float) -> str | None:
    """The error in log.txt at or after a time: its message, or the end of a traceback."""
    starts = [i for i, (when, text) in enumerate(log) if _ERROR.match(text) and when + 1 >= since]
    if not starts:
        return None
    _when, first = log[starts[-1]]
    if first.startswith("error: "):
        return first.removeprefix("error: ")
    frames = (text for _when, text in log[starts[-1] + 1 :])
    return next((text for text in frames if text and not text.startswith(" ")), first)


def _last_sign(run: Path) -> float:
    return max(_modified(run / name) for name in _SIGNS)


def _modified(path: Path) -> float:
    """Modification time of a file, in seconds since 1970; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _last_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The complete records at the end of a metrics file, and a problem with an invalid one."""
    found, wrong = [], []
    for line in _last_lines(path):
        try:
            record = parse_json(line)
        except ValueError:
            continue  # being written
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        bad = next((name for name, value in record.items() if _fault(name, value)), None)
        if bad is None:
            found.append(record)
        else:
            where = f"{path.name}: {bad} of step {shown(record['step'])}"
            wrong.append(f"{where} is {_fault(bad, record[bad])}: not counted")
    return found, wrong[-1:]


def _last_lines(path: Path) -> list[str]:
    """The last lines of a metrics file, without depth profiles, which may be long."""
    limit = _TAIL_BYTES
    while True:
        lines = [line for line in _tail(path, limit) if _DEPTH not in line]
        if len(lines) > _STEPS_AVERAGED or limit >= _LONGEST_TAIL or limit > _size(path):
            return lines
        limit *= 16


def _log_tail(path: Path) -> list[tuple[float, str]]:
    """The last messages of log.txt: seconds since 1970, and a line."""
    matches = (_LOG_LINE.match(line) for line in _tail(path))
    return [
        (datetime.strptime(m[1], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp(), m[2])
        for m in matches
        if m
    ]


def _tail(path: Path, limit: int = _TAIL_BYTES) -> list[str]:
    """The last lines of a file; only the last one may be incomplete."""
    try:
        with open_regular(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - limit))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[1:] if size > limit else lines


def _held_metrics() -> set[Path]:
    """All metrics.jsonl that a process of this user on this machine has open for writing.

    A process of any name; one that only reads it, such as tail or the MLflow worker, is no run.
    """
    opened: list[Any] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            opened += process.open_files()
    metrics = [file for file in opened if file.path.endswith("metrics.jsonl")]
    return {Path(file.path) for file in metrics if getattr(file, "mode", "a") != "r"}  # on Linux
