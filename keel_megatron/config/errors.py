"""Errors that are the user's to mend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keel_megatron.errors import UserError

__all__ = ["ConfigError", "Problem", "UserError"]


class DivergedError(UserError):
    """Training has diverged and stops: the command prints the message alone and exits with 65."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    path: str
    """Dotted path of the setting, such as `model.blocks`."""
    message: str
    """The value that was given and what would be right."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class ConfigError(UserError):
    """Everything that is wrong with a configuration, reported together."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        noun = "problem" if len(problems) == 1 else "problems"
        lines = [f"{source}: {len(problems)} {noun} in the configuration"]
        super().__init__("\n".join(lines + [f"  {problem}" for problem in problems]))
