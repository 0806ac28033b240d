"""Whether data is prepared or reused, as its user is told."""

from __future__ import annotations

from typing import Any

from keel_megatron.config.run import RunConfig
from keel_megatron.data.prepare import prepare


def is_reused(
    config: RunConfig, expected: dict[str, Any] | None = None, said: list[str] | None = None
) -> bool:
    """Prepare the data; `said` gets what `prepare` logs."""
    lines: list[str] = [] if said is None else said
    prepare(config, lines.append, expected)
    reused, prepared = (
        any(line.startswith(begin) for line in lines)
        for begin in ("reusing the prepared data in ", "preparing ")
    )
    assert reused != prepared, lines
    return reused
