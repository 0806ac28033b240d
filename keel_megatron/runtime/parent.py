"""Ends a rank when its launcher dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Send this rank SIGTERM when its launcher dies, even by SIGKILL.

    The rank then saves and exits, as on any SIGTERM. Otherwise the ranks of a killed launcher would
    keep training in the background. Linux only; does nothing elsewhere, or in a process without a
    launcher.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.environ.get("KEEL_LAUNCHER_PID")
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if launcher is not None and os.getppid() != int(launcher):  # it died before the call above
        os.kill(os.getpid(), signal.SIGTERM)
