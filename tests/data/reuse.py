"""Whether data was prepared before, as the log says."""

from __future__ import annotations

from typing import Any

from keel_megatron.config.run import RunConfig
from keel_megatron.data.prepare import prepare


def reused(
    config: RunConfig, expected: dict[str, Any] | None = None, said: list[str] | None = None
) -> bool:
    """Prepare the data; False if it had to be made, which adds to `said` why."""
    lines: list[str] = []
    prepare(config, lines.append, expected)
    if said is not None:
        said.extend(lines)
    return any(line.startswith("reusing the prepared data in ") for line in lines)
