"""Settings that have no effect because of another one.

They are reported and not refused: a configuration may have settings of an optimizer that an
override replaces. What would be wrong, and not only useless, is refused in `checks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from keel_megatron.config.run import RunConfig

_USED_WITH: Final[Sequence[tuple[str, tuple[Any, ...], tuple[str, ...]]]] = (
    ("optimizer.name", ("muon",), ("momentum", "nesterov", "ns_steps", "adjust_lr_fn")),
    ("schedule.decay", ("wsd",), ("decay_fraction",)),
    ("schedule.decay", ("cosine", "wsd"), ("min_learning_rate",)),
)
"""A setting, the values with which others of its section are used, and those others."""


def unused_settings(config: RunConfig) -> Iterator[str]:
    """A message for each kind of settings that are not at their default and have no effect."""
    for path, values, names in _USED_WITH:
        section_name, _dot, key = path.partition(".")
        section = getattr(config, section_name)
        value = getattr(section, key)
        fields = type(section).model_fields
        given = [name for name in names if getattr(section, name) != fields[name].default]
        if given and value not in values:
            shown = ", ".join(f"{section_name}.{name}" for name in given)
            yield f"{shown}: no effect with {path}: {value}"
