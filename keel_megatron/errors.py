"""Errors that a user can fix, and the error of a run that diverges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keel_megatron.urls import without_credentials


class UserError(Exception):
    """A configuration or usage error: the command prints only the message and exits with 2.

    The message names the setting or file and says what would be valid.

    Args:
        message: text for the user; URLs in it are shown without parts that may be secret.
        reported: another rank reports the error; this one only exits.
    """

    def __init__(self, message: str, *, reported: bool = False) -> None:
        super().__init__(without_credentials(message))
        self.reported = reported


class DivergedError(UserError):
    """Training has diverged: the command prints only the message and exits with 65."""


@dataclass(frozen=True)
class Problem:
    """One error in a configuration."""

    path: str
    """Dotted path of the setting, such as `model.blocks`."""
    message: str
    """The given value and what would be valid."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class ConfigError(UserError):
    """All errors in a configuration, reported together."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        noun = "problem" if len(problems) == 1 else "problems"
        lines = [f"{source}: {len(problems)} {noun} in the configuration"]
        super().__init__("\n".join(lines + [f"  {problem}" for problem in problems]))
