"""Items to deliver to MLflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keel_megatron.config.reading import parse_json, read_small

POINTS_PER_CALL = 1000
"""Maximum number of points in one call of MLflow."""


@dataclass(frozen=True)
class Item:
    """A record, an event or a measurement."""

    stream: str
    place: tuple[int, int]
    """The number of its file in the stream, and where its line ends there, in bytes."""
    values: dict[str, Any]
    mark: tuple[int, int] = (0, 0)
    """Of a record: a byte of its line, and the checksum from there to the line's end."""

    @property
    def kind(self) -> str:
        """Kind: start, metrics, system, evaluation, tags, changes, artifact, rewind or end."""
        return str(self.values["kind"])

    @property
    def points(self) -> int:
        """Number of metric points in it."""
        return len(self.values.get("values", ()))


_FIELDS: dict[str, dict[str, type]] = {
    "start": {"name": str, "time": int},
    "metrics": {"step": int, "values": dict, "time": int},
    "system": {"values": dict, "time": int},
    "evaluation": {"step": int, "values": dict, "time": int},
    "tags": {"tags": dict},
    "changes": {"changes": list},
    "artifact": {"path": str},
    "rewind": {"back_to": int, "time": int},
    "end": {"status": str, "time": int},
}


def is_item(values: Any) -> bool:
    """Whether a line is a valid item of its kind: the file is untrusted."""
    if not isinstance(values, dict):
        return False
    fields = _FIELDS.get(str(values.get("kind")), {"kind": str})
    back_to = values.get("back_to")
    return all(isinstance(values.get(name), kind) for name, kind in fields.items()) and (
        back_to is None or isinstance(back_to, int)
    )


def one_call(items: Iterable[Item]) -> list[Item]:
    """The first items: points for one call, or one item of another kind."""
    batch: list[Item] = []
    points = 0
    for item in items:
        is_points = item.kind in ("metrics", "system")
        if batch and (not is_points or points + item.points > POINTS_PER_CALL):
            break
        batch.append(item)
        points += item.points
        if not is_points or len(batch) == POINTS_PER_CALL:
            break
    return batch


def note_in(path: Path) -> dict[str, Any]:
    """A reader's note, a small JSON object; empty if there is none."""
    try:
        return dict(parse_json(read_small(path)))
    except (OSError, ValueError, TypeError):
        return {}
