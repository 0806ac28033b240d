"""The error for a user's mistake."""

from __future__ import annotations

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
