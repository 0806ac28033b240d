"""Settings that changed during a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

_SHOWN = 200


@dataclass(frozen=True)
class Change:
    """A setting whose value changed after step `step`."""

    step: int
    """Step of the checkpoint that the run resumed from."""
    setting: str
    """Such as optimizer.learning_rate."""
    before: Any
    """As in JSON."""
    after: Any

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Change:
        """What `to_json` made."""
        return cls(values["step"], values["setting"], values["before"], values["after"])

    def __str__(self) -> str:
        return f"{self.setting} {_shown(self.before)} -> {_shown(self.after)}"


def differences(step: int, before: dict[str, Any], after: dict[str, Any]) -> Iterable[Change]:
    """The settings that differ between two flat configurations, sorted by name."""
    for setting in sorted(before.keys() | after.keys()):
        if before.get(setting) != after.get(setting):
            yield Change(step, setting, before.get(setting), after.get(setting))


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
