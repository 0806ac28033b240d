"""How a run's process ends, for whoever started it.

| code | the run | what a launcher does |
|---|---|---|
| 0 | is done | nothing |
| 1 | failed with an error | start the group again: it goes on from its newest checkpoint |
| 2 | met a mistake that only its user can mend | nothing |
| 65 | diverged: `guard.limit` reached, or weights that are not finite | nothing |
| 70 | hung, and its watchdog ended it | start the group again |
| 75 | saved, on SIGUSR1 or at `training.exit_after` | submit the job again |
| 129, 130, 143 | saved, on SIGHUP, SIGINT or SIGTERM | what the sender of the signal has in mind |
| other 128 + n | was killed by signal n | start the group again |

65, 70 and 75 are EX_DATAERR, EX_SOFTWARE and EX_TEMPFAIL of sysexits.h.

torchrun hides them: it starts a group again after any code but 0, and itself ends with 1 then. So
under a torchrun with restarts left to give, a run that was saved leaves with 0; and in any case the
code stands in the file `exit_code` of the run's folder, which is absent after an error. A user's
mistake may be about that folder: it is noted in a file of the launcher's, `$KEEL_MISTAKE_FILE`.
That ends the next starts at once, and the launcher with 2.
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
"""Codes after which the same command, started again at once, is not what is wanted."""

FILE = "exit_code"
_RESERVED = "exit_code.partial"
MISTAKE = "KEEL_MISTAKE_FILE"


def to_shell(returncode: int) -> int:
    """A subprocess's return code as a shell has it: -n, ended by signal n, is 128 + n."""
    return returncode if returncode >= 0 else 128 - returncode


def for_torchrun(code: int) -> int:
    """The code for this process to end with: 0 for one that torchrun would take for a failure."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return DONE if restarts > 0 and code in FINAL - {USER_ERROR} else code


def write(folder: Path, code: int) -> None:
    """Leave the code in a run's folder, whole or not at all.

    On a full disk it takes the room that `clear` has kept. If even that fails, standard error says
    so, and nothing changes about how the run has ended.
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
    """Remove what an earlier process left, and keep room for what `write` will leave."""
    (folder / FILE).unlink(missing_ok=True)
    reserved = folder / _RESERVED
    with contextlib.suppress(OSError):  # `write` tries again
        reserved.unlink(missing_ok=True)
        reserved.write_text(" " * 8, encoding="utf-8")


def note_mistake() -> None:
    """Tell the launcher, if it wants to know, that only its user can help."""
    if MISTAKE in os.environ:
        Path(os.environ[MISTAKE]).write_text(f"{USER_ERROR}\n", encoding="utf-8")


def is_mistake() -> bool:
    """Whether an earlier process of this launcher has met one."""
    path = os.environ.get(MISTAKE)
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0
