"""Work counted where a measured time would depend on the machine and on what else it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def calls_of(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and how many calls it makes, Python's and C's.

    The number is the same on every machine, however busy: it bounds an algorithm's work where a
    measured time would not.
    """
    count = 0

    def note(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        result = function()
    finally:
        sys.setprofile(before)
    return result, count
