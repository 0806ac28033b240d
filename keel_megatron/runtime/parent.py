"""Ends a rank when its launcher dies, and a launcher when the study that started it dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

STARTED_BY = "KEEL_STUDY_PID"
"""Variable with the process of the study that has started this launcher."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """Send this rank SIGTERM when its launcher dies, even by SIGKILL.

    The rank then ends as on any SIGTERM; one that trains saves first. Otherwise the ranks of a
    killed launcher would keep working in the background. Linux only; does nothing elsewhere, or in
    a process without a launcher.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    _end_with(os.environ.get("KEEL_LAUNCHER_PID"))


def end_with_study() -> None:
    """Send this launcher SIGTERM when its study dies, which it hands on to its ranks.

    Linux only; does nothing elsewhere, or in a launcher that no study has started.
    """
    if sys.platform == "linux" and STARTED_BY in os.environ:
        _end_with(os.environ[STARTED_BY])


def _end_with(parent: str | None) -> None:
    """Send this process SIGTERM when its parent dies.

    Args:
        parent: the parent's process number, to see that it has not died already; None: unknown.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent is not None and os.getppid() != int(parent):  # it died before the call above
        os.kill(os.getpid(), signal.SIGTERM)
