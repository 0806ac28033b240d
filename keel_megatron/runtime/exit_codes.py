"""Exit codes of a run's process.

| exit code | meaning | launcher's action |
|---|---|---|
| 0 | run complete | none |
| 1 | error | restart the group, which resumes from the newest checkpoint |
| 2 | configuration or usage error; fix it and restart | none |
| 65 | diverged: `guard.limit` reached, or non-finite weights | none |
| 70 | hang, ended by the watchdog | restart the group |
| 75 | checkpoint saved, on SIGUSR1 or at `training.exit_after` | resubmit the job |
| 129, 130, 143 | checkpoint saved, on SIGHUP, SIGINT or SIGTERM | none; Kubernetes restarts 143 |
| other 128 + n | killed by signal n | restart the group |

65, 70 and 75 are EX_DATAERR, EX_SOFTWARE and EX_TEMPFAIL of sysexits.h.

torchrun restarts a group after any code but 0, and exits with 1 itself. So under a torchrun with
restarts left, a saved run exits with 0. In any case the code is in the file `exit_code` of the
run's folder, which is absent after an error. A usage error may concern that folder: it is recorded
in a file of the launcher, `$KEEL_MISTAKE_FILE`. The next starts then exit at once, and the launcher
exits with 2.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

DONE = 0
FAILED = 1
USER_ERROR = 2
DIVERGED = 65
HUNG = 70
SAVED = 75
INTERRUPTED = 130

FINAL = frozenset({DONE, USER_ERROR, DIVERGED, SAVED, 129, INTERRUPTED, 143})
"""Exit codes after which the command must not be restarted at once."""

FILE = "exit_code"
_RESERVED = "exit_code.partial"
MISTAKE = "KEEL_MISTAKE_FILE"


def to_shell(returncode: int) -> int:
    """A subprocess's return code as a shell reports it: -n (signal n) becomes 128 + n."""
    return returncode if returncode >= 0 else 128 - returncode


def for_torchrun(code: int) -> int:
    """The exit code of this process: 0 where torchrun would otherwise restart it."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or "0")
    return DONE if restarts > 0 and code in FINAL - {USER_ERROR} else code


def write(folder: Path, code: int) -> None:
    """Write the code to a run's folder, atomically.

    On a full disk it uses the space that `clear` reserved. If that fails too, a message goes to
    standard error, and the exit code stays the same.
    """
    try:
        kept = os.open(folder / _RESERVED, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            text = f"{code}\n".encode()
            if os.write(kept, text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(kept, len(text))
        finally:
            os.close(kept)
        os.replace(folder / _RESERVED, folder / FILE)
    except OSError as error:
        print(f"cannot write {folder / FILE}: {error.strerror}", file=sys.stderr)


def clear(folder: Path) -> None:
    """Remove the code of an earlier process, and reserve space for `write`."""
    (folder / FILE).unlink(missing_ok=True)
    reserved = folder / _RESERVED
    with contextlib.suppress(OSError):  # `write` tries again
        reserved.unlink(missing_ok=True)
        reserved.write_text(" " * 8, encoding="utf-8")


def note_mistake() -> None:
    """Record a usage error for the launcher, if it asked for that."""
    if MISTAKE in os.environ:
        Path(os.environ[MISTAKE]).write_text(f"{USER_ERROR}\n", encoding="utf-8")


def is_mistake() -> bool:
    """Whether an earlier process of this launcher recorded a usage error."""
    path = os.environ.get(MISTAKE)
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0
