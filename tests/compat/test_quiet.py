"""Megatron-core says nothing of what is deliberate here."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
if sys.argv[1:] == ["installed"]:
    from keel_megatron import compat
    compat.install()
import keel_megatron.training.run
"""


def test_importing_megatron_core_says_nothing() -> None:
    said = [
        subprocess.run(
            [sys.executable, "-c", PROBE, *arguments], check=True, capture_output=True, text=True
        ).stderr
        for arguments in (["installed"], [])
    ]
    assert said[0] == ""
    assert "not installed" in said[1]  # or the filters are not needed any more
