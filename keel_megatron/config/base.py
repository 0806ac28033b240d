"""What every section of a run's configuration shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A frozen section of the configuration: unknown keys are errors, values never change.

    Numbers are taken as they are written: "8", 8.5 and true are no whole numbers.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def _as_path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


TextPath = Annotated[Path, BeforeValidator(_as_path)]
"""A path, written as text."""
