"""What every section of a run's configuration shares."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A frozen section of the configuration: unknown keys are errors, values never change.

    Types are strict: "8", 8.5 and true are not accepted as integers.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def as_path(value: Any) -> Any:
    """Convert text to a path and expand `~` or `~user`; shells do not in `section.key=~/runs`.

    Raises:
        ValueError: it is no path; the message continues the setting's name.
    """
    if not isinstance(value, str) or not value:
        return value
    if "\0" in value:
        raise ValueError("contains a NUL character, which a path cannot contain")
    try:
        os.fsencode(value)
        path = Path(value).expanduser() if value.startswith("~") else Path(value)
    except RuntimeError:
        raise ValueError(
            "begins with the home folder of a user who does not exist on this machine"
        ) from None
    except UnicodeEncodeError:
        raise ValueError(
            f"cannot be encoded as a file name in this locale ({sys.getfilesystemencoding()}); "
            "set LC_ALL=C.UTF-8"
        ) from None
    # A folder named ~ (./~/runs) must not be expanded when the saved configuration is read.
    return path.absolute() if str(path).startswith("~") else path


TextPath = Annotated[Path, BeforeValidator(as_path)]
"""A path given as text; `~` is the home folder."""


def one_or_many(value: object) -> object:
    """Accept a single path or name in place of a list."""
    if isinstance(value, (str, Path)):
        return (value,)
    return tuple(value) if isinstance(value, list) else value
