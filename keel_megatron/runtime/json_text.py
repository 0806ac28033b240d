"""Strict JSON for other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def json_text(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """JSON that every parser reads, in ASCII: a number that is not finite is null.

    Args:
        value: what `json.dumps` takes.
        default: turns other objects into those, as for `json.dumps`.
    """
    plain = json.loads(json.dumps(value, default=default))
    return json.dumps(_finite(plain), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
