"""What every section of a run's configuration shares."""

from __future__ import annotations

import os
import sys
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
    """Text as a path, its `~` or `~user` expanded: no shell does that in `section.key=~/runs`."""
    if not isinstance(value, str) or not value:
        return value
    if "\0" in value:
        raise ValueError("has a NUL character in it, which no path can have")
    try:
        os.fsencode(value)
        path = Path(value).expanduser() if value.startswith("~") else Path(value)
    except RuntimeError:
        raise ValueError("begins with the home folder of a user who is not known here") from None
    except UnicodeEncodeError:
        raise ValueError(
            f"cannot be the name of a file in this locale ({sys.getfilesystemencoding()}); "
            "set LC_ALL=C.UTF-8"
        ) from None
    # A folder that is called ~ (./~/runs) is still itself when the configuration is read again.
    return path.absolute() if str(path).startswith("~") else path


TextPath = Annotated[Path, BeforeValidator(_as_path)]
"""A path, written as text; `~` is the home folder."""
