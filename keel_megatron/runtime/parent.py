"""A rank does not outlive the launcher that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Have this rank sent SIGTERM when its launcher dies, even by SIGKILL.

    It then saves and ends, as on any SIGTERM. Without it the ranks of a killed launcher would
    train on unseen, while the run is started again in the same folder. Linux only; elsewhere, and
    in a process that no launcher started, nothing happens.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.environ.get("KEEL_LAUNCHER_PID")
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if launcher is not None and os.getppid() != int(launcher):  # it died before the call above
        os.kill(os.getpid(), signal.SIGTERM)
